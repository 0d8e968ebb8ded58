//! The domain of full names.

use std::fmt;
use std::str::FromStr;

/// The longest one, in characters: a name has 253 (RFC 1035, 2.3.4), and pod, namespace and network need theirs.
const LONGEST: usize = 100;
/// The longest label (RFC 1035, 2.3.4).
const LABEL: usize = 63;

/// The domain in which every network's names are full ones: `db.shop.backend.portolan.internal`. Lower case, no dot at its end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Domain(String);

/// It is no domain.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "domain: {0:?} was given; allowed: DNS labels of 1 to 63 letters, digits and '-' that neither begin nor end with '-', joined by dots, 100 characters at most"
)]
pub struct DomainError(String);

impl Domain {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if name.len() <= LONGEST && name.split('.').all(is_label) {
            Ok(Self(name))
        } else {
            Err(DomainError(text.to_owned()))
        }
    }
}

fn is_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=LABEL).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_domain() {
        for text in ["portolan.internal", "Portolan.Internal.", "x", "a-b.c1"] {
            assert_eq!(text.parse(), Ok(Domain(text.trim_end_matches('.').to_ascii_lowercase())), "{text}");
        }
        let (label, long) = ("a".repeat(64), ["abcdefghi"; 11].join("."));
        for text in ["", ".", "a..b", "-a.b", "a.b-", "a_b", "ä.b", "a b", "portolan.internal..", &label, &long] {
            let error = text.parse::<Domain>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("domain: {text:?} was given; allowed: ")), "{error}");
        }
    }
}
