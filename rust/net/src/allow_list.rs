//! The allow-list of a fleet: which public keys are admitted, and as whom.
//! A text file with one line per key, `gateway NAME KEY`, `node NAME KEY` or `client NAME TENANT KEY`; a name may
//! hold several keys, so that a key can be replaced without a gap. Reading is O(lines), a look-up O(1).
//! It does not know sockets; a change reaches them through the context that holds the list.

use crate::key::{KeyError, PublicKey};
use crate::principal::{Principal, Role};
use rustc_hash::FxHashMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest file that is read.
pub const MAX_LIST_BYTES: u64 = 16 * 1024 * 1024;
/// Most keys of one list.
pub const MAX_LIST_KEYS: usize = 100_000;

/// What is wrong with an allow-list.
#[derive(Debug, thiserror::Error)]
pub enum AllowListError {
    /// The file could not be read.
    #[error("allow-list {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is over the limit.
    #[error("the allow-list is over {MAX_LIST_BYTES} bytes; remove keys that are no longer used")]
    TooLarge,
    /// A line is wrong; lines are counted from 1.
    #[error("allow-list line {line}: {fault}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        fault: LineFault,
    },
}

/// What is wrong with one line.
#[derive(Debug, thiserror::Error)]
pub enum LineFault {
    /// Not three or four words.
    #[error("expected `gateway NAME KEY`, `node NAME KEY` or `client NAME TENANT KEY`, found {words} words")]
    Words {
        /// Words found.
        words: usize,
    },
    /// The first word is no role.
    #[error("the role must be gateway, node or client")]
    Role,
    /// A name that is not allowed.
    #[error("a name or tenant is 1 to 64 letters, digits, `.`, `_` or `-`")]
    Name,
    /// The last word is no key.
    #[error("{0}")]
    Key(KeyError),
    /// The key was listed before.
    #[error("the key is on line {first} already; give every principal a key of its own")]
    Repeated {
        /// Line of its first use.
        first: usize,
    },
    /// One more than the limit.
    #[error("more than {MAX_LIST_KEYS} keys; remove those that are no longer used")]
    TooMany,
}

/// Public keys and their holders.
#[derive(Clone, Debug, Default)]
pub struct AllowList {
    principals: FxHashMap<PublicKey, Arc<Principal>>,
}

impl AllowList {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, AllowListError> {
        let failed = |source| AllowListError::File { path: path.to_path_buf(), source };
        let mut text = String::new();
        let file = fs::File::open(path).map_err(failed)?;
        file.take(MAX_LIST_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        text.parse()
    }

    /// Adds a key; `false` when it was listed before, which leaves the list as it is.
    pub fn insert(&mut self, key: PublicKey, principal: Principal) -> bool {
        let free = !self.principals.contains_key(&key);
        if free {
            self.principals.insert(key, Arc::new(principal));
        }
        free
    }

    /// Takes a key off; peers that it admitted before stay connected until they end.
    pub fn remove(&mut self, key: &PublicKey) -> bool {
        self.principals.remove(key).is_some()
    }

    /// The holder of a key.
    pub fn principal(&self, key: &PublicKey) -> Option<&Arc<Principal>> {
        self.principals.get(key)
    }

    /// How many keys are admitted.
    pub fn len(&self) -> usize {
        self.principals.len()
    }

    /// Whether nobody is admitted.
    pub fn is_empty(&self) -> bool {
        self.principals.is_empty()
    }
}

impl std::str::FromStr for AllowList {
    type Err = AllowListError;

    /// Blank lines and lines that begin with `#` are skipped; a `#` later is part of a key.
    fn from_str(text: &str) -> Result<Self, AllowListError> {
        if text.len() as u64 > MAX_LIST_BYTES {
            return Err(AllowListError::TooLarge);
        }
        let mut list = Self::default();
        let mut lines_of_keys: FxHashMap<PublicKey, usize> = FxHashMap::default();
        for (index, content) in text.lines().enumerate() {
            let line = index + 1;
            let wrong = |fault| AllowListError::Line { line, fault };
            let content = content.trim();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let (key, principal) = read_line(content).map_err(wrong)?;
            if list.len() == MAX_LIST_KEYS {
                return Err(wrong(LineFault::TooMany));
            }
            if let Some(first) = lines_of_keys.insert(key, line) {
                return Err(wrong(LineFault::Repeated { first }));
            }
            list.insert(key, principal);
        }
        Ok(list)
    }
}

/// The key and holder of a line that is neither blank nor a comment.
fn read_line(content: &str) -> Result<(PublicKey, Principal), LineFault> {
    let words: Vec<&str> = content.split_ascii_whitespace().take(5).collect();
    let role = words.first().and_then(|word| Role::from_word(word)).ok_or(LineFault::Role)?;
    let (name, tenant, key) = match (role, words.as_slice()) {
        (Role::Client, [_, name, tenant, key]) => (name, Some(*tenant), key),
        (Role::Gateway | Role::Node, [_, name, key]) => (name, None, key),
        _ => return Err(LineFault::Words { words: words.len() }),
    };
    let principal = Principal::new(role, name, tenant).ok_or(LineFault::Name)?;
    Ok((key.parse().map_err(LineFault::Key)?, principal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyPair;

    fn key() -> PublicKey {
        KeyPair::generate().expect("CURVE").public
    }

    #[test]
    fn a_list_names_the_holder_of_every_key() {
        let (gateway, old, new, client) = (key(), key(), key(), key());
        let text = format!(
            "# fleet of the lab\n\ngateway edge {gateway}\n  node gpu-1 {old}\nnode gpu-1\t{new}\r\nclient app acme {client}\n"
        );
        let list: AllowList = text.parse().expect("a valid list");
        assert_eq!(list.len(), 4);
        let user = |key| list.principal(key).map(ToString::to_string);
        assert_eq!(user(&gateway).as_deref(), Some("gateway:edge"));
        assert_eq!((user(&old), user(&new)), (Some("node:gpu-1".into()), Some("node:gpu-1".into())));
        assert_eq!(user(&client).as_deref(), Some("client:app:acme"));
        assert_eq!(user(&key()), None);
    }

    #[test]
    fn a_wrong_line_is_named_by_its_number() {
        let good = key();
        let fault = |text: &str| match format!("# first\n{text}").parse::<AllowList>() {
            Err(AllowListError::Line { line: 2, fault }) => fault,
            other => panic!("{text}: {other:?}"),
        };
        assert!(matches!(fault("node"), LineFault::Words { words: 1 }));
        assert!(matches!(fault(&format!("node a b {good}")), LineFault::Words { words: 4 }));
        assert!(matches!(fault(&format!("client a {good}")), LineFault::Words { words: 3 }));
        assert!(matches!(fault(&"client ".repeat(1000)), LineFault::Words { words: 5 }));
        assert!(matches!(fault(&format!("admin a {good}")), LineFault::Role));
        assert!(matches!(fault(&format!("node a:b {good}")), LineFault::Name));
        assert!(matches!(fault(&format!("node {} {good}", "x".repeat(65))), LineFault::Name));
        assert!(matches!(fault("node a abc"), LineFault::Key(KeyError::Length { given: 3 })));
        let twice = format!("node a {good}\nnode b {good}").parse::<AllowList>();
        assert!(matches!(twice, Err(AllowListError::Line { line: 2, fault: LineFault::Repeated { first: 1 } })));
    }

    #[test]
    fn a_list_over_its_limits_is_refused() {
        let large = "#".repeat(MAX_LIST_BYTES as usize + 1);
        assert!(matches!(large.parse::<AllowList>(), Err(AllowListError::TooLarge)));
        let line = |index: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&index.to_le_bytes());
            format!("node n{index} {}\n", PublicKey::from_bytes(bytes))
        };
        let mut text: String = (0..MAX_LIST_KEYS).map(line).collect();
        assert_eq!(text.parse::<AllowList>().expect("exactly the limit").len(), MAX_LIST_KEYS);
        text.push_str(&line(MAX_LIST_KEYS));
        let over = text.parse::<AllowList>();
        assert!(matches!(over, Err(AllowListError::Line { line: 100_001, fault: LineFault::TooMany })));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = AllowList::load(Path::new("/nonexistent/fleet.keys")).expect_err("no such file");
        assert!(error.to_string().contains("/nonexistent/fleet.keys"));
    }
}
