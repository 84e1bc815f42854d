//! Who gets the message: exactly the part. The header only says who of them is shown, and under which name.

use std::collections::HashMap;

use super::field::{self, Address, fields};
use super::{Case, LossKind, Losses};

/// Characters of a display name.
const MAX_NAME: usize = 256;

/// The recipients of a part, each once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Recipients {
    pub(super) to: Vec<Address>,
    pub(super) cc: Vec<Address>,
    pub(super) bcc: Vec<Address>,
}

impl Recipients {
    /// Those of the part whom To or Cc names are shown there; the first place counts. All others get a blind copy.
    pub(super) fn divide(header: &[u8], case: &Case<'_>, losses: &mut Losses) -> Self {
        let rcpts = case.part.iter().filter_map(|at| case.envelope.rcpts.get(*at));
        let mut order: Vec<&str> = Vec::new();
        // The place of each, which goes away once it is shown. Case in a local part tells nobody apart in practice.
        let mut waiting: HashMap<String, usize> = HashMap::new();
        for rcpt in rcpts {
            let address = rcpt.path.as_str();
            waiting.entry(address.to_lowercase()).or_insert_with(|| {
                order.push(address);
                order.len() - 1
            });
        }
        let mut divided = Self::default();
        for (name, shown) in [("To", &mut divided.to), ("Cc", &mut divided.cc)] {
            let mut others = 0;
            for field in fields(header).filter(|field| field.is(name)) {
                for found in field::addresses(field.value) {
                    let key = found.address.to_lowercase();
                    let is_shown = waiting.remove(&key).and_then(|at| order.get(at).copied());
                    match is_shown {
                        Some(address) => shown.push(Address {
                            name: shown_name(found.name, address),
                            address: address.to_owned(),
                        }),
                        None => others += 1,
                    }
                }
            }
            if others > 0 {
                let why = "names addresses that are not shown: they are no recipients here, or twice there";
                losses.push(LossKind::Recipient, name, why);
            }
        }
        let mut rest: Vec<usize> = waiting.into_values().collect();
        rest.sort_unstable();
        let blind = rest.into_iter().filter_map(|at| order.get(at));
        divided.bcc = blind
            .map(|address| Address { name: String::new(), address: (*address).to_owned() })
            .collect();
        divided
    }
}

/// A name that says something beside the address.
fn shown_name(name: String, address: &str) -> String {
    match name.eq_ignore_ascii_case(address) {
        true => String::new(),
        false => name.chars().take(MAX_NAME).collect(),
    }
}
