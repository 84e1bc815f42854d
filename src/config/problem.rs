//! What is wrong with a file, and where.

use std::collections::BTreeSet;
use std::fmt;

use crate::smtp::reply::Escaped;

/// One thing that is wrong, or in `Loaded::warnings` one to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1; 0 where it is about the file as a whole.
    pub line: u32,
    /// In characters, from 1; 0 as for `line`.
    pub column: u32,
    /// Table and key, such as `[provider] port`; empty where there is none.
    pub key: String,
    /// What is wrong and what to write instead. Never the value of a secret.
    pub text: String,
}

/// `line:column: [table] key: text`, for after the file's name and a colon.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        match self.key.as_str() {
            "" => write!(f, " {}", self.text),
            key => write!(f, " {key}: {}", self.text),
        }
    }
}

/// All that is wrong with a file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    pub file: String,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl Problems {
    /// One problem with the file as a whole.
    pub(super) fn whole(file: String, text: String) -> Self {
        Self { file, problems: vec![Problem { line: 0, column: 0, key: String::new(), text }] }
    }
}

/// One per line.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().enumerate() {
            let newline = if number == 0 { "" } else { "\n" };
            write!(f, "{newline}{}:{problem}", self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// What was found so far; positions are offsets in octets.
#[derive(Default)]
pub(super) struct Findings(Vec<Finding>);

pub(super) struct Finding {
    pub(super) at: usize,
    pub(super) key: String,
    pub(super) text: String,
    pub(super) what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The file is no TOML there.
    Syntax,
    /// What is written is wrong.
    Wrong,
    /// Something is not written, or two things do not fit: not sure while the file cannot be read in full.
    Missing,
    /// Works, but is worth a look.
    Warning,
}

impl Findings {
    pub(super) fn syntax(&mut self, at: usize, text: String) {
        self.push(at, String::new(), text, What::Syntax);
    }

    pub(super) fn wrong(&mut self, at: usize, key: &str, text: String) {
        self.push(at, key.to_owned(), text, What::Wrong);
    }

    pub(super) fn missing(&mut self, at: usize, key: &str, text: String) {
        self.push(at, key.to_owned(), text, What::Missing);
    }

    pub(super) fn warning(&mut self, at: usize, key: &str, text: String) {
        self.push(at, key.to_owned(), text, What::Warning);
    }

    fn push(&mut self, at: usize, key: String, text: String, what: What) {
        self.0.push(Finding { at, key, text, what });
    }

    /// Problems and warnings with line and column, in the order of the file.
    ///
    /// Where the file is no TOML, what was read of that line, and what seems to be missing, is left out: it would only
    /// repeat the syntax error in other words. After a broken table header, nothing is known of what follows.
    pub(super) fn in_words(mut self, source: &str) -> (Vec<Problem>, Vec<Problem>) {
        let lines = Lines::of(source);
        let broken: BTreeSet<usize> = (self.0.iter())
            .filter(|finding| finding.what == What::Syntax)
            .map(|finding| lines.line(finding.at))
            .collect();
        let header_is_broken = broken.iter().any(|line| lines.text(*line).trim().starts_with('['));
        if !broken.is_empty() {
            self.0.retain(|finding| match finding.what {
                What::Syntax => true,
                What::Wrong => !header_is_broken && !broken.contains(&lines.line(finding.at)),
                What::Missing | What::Warning => false,
            });
        }
        self.0.sort_by(|a, b| (a.at, &a.key).cmp(&(b.at, &b.key)));
        let (warnings, problems): (Vec<Finding>, _) =
            self.0.into_iter().partition(|finding| finding.what == What::Warning);
        let placed = |findings: Vec<Finding>| -> Vec<Problem> {
            let mut problems: Vec<Problem> =
                findings.into_iter().map(|finding| lines.place(finding)).collect();
            problems.dedup();
            problems
        };
        (placed(problems), placed(warnings))
    }
}

/// Where lines begin, in octets.
struct Lines<'a> {
    source: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(source: &'a str) -> Self {
        let after_newline = source.match_indices('\n').map(|(at, _)| at + 1);
        Self { source, starts: std::iter::once(0).chain(after_newline).collect() }
    }

    /// Counted from 0.
    fn line(&self, at: usize) -> usize {
        self.starts.partition_point(|start| *start <= at) - 1
    }

    fn text(&self, line: usize) -> &'a str {
        let start = self.starts.get(line).copied().unwrap_or_default();
        let end = self.starts.get(line + 1).copied().unwrap_or(self.source.len());
        self.source.get(start..end).unwrap_or_default()
    }

    fn place(&self, finding: Finding) -> Problem {
        let line = self.line(finding.at);
        let before = finding.at - self.starts.get(line).copied().unwrap_or_default();
        let column = self.text(line).char_indices().take_while(|(at, _)| *at < before).count();
        let from_one = |n: usize| u32::try_from(n + 1).unwrap_or(u32::MAX);
        Problem {
            line: from_one(line),
            column: from_one(column),
            key: finding.key,
            text: finding.text,
        }
    }
}

/// Text of the file fit to be shown: escaped, and cut where it is long.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut chars = text.char_indices();
    match chars.nth(LONGEST).and_then(|(end, _)| text.get(..end)) {
        Some(head) => format!("{}…", Escaped(head.as_bytes())),
        None => Escaped(text.as_bytes()).to_string(),
    }
}
