//! What an encrypted dataset is sealed with.

use std::fmt;

use crate::name::InvalidName;

/// A wrapping key (zfs-load-key(8)): given to `zfs` on its standard input only, and printed nowhere.
#[derive(Clone, Eq, PartialEq)]
pub struct Key(Material);

#[derive(Clone, Eq, PartialEq)]
enum Material {
    Raw([u8; 32]),
    Passphrase(String),
}

impl Key {
    /// A key of 32 bytes (`keyformat=raw`).
    pub fn raw(bytes: &[u8]) -> Result<Self, InvalidName> {
        let bytes = <[u8; 32]>::try_from(bytes).map_err(|_| InvalidName {
            what: "raw key",
            given: format!("{} bytes", bytes.len()),
            allowed: "32 bytes",
        })?;
        Ok(Self(Material::Raw(bytes)))
    }

    /// A passphrase (`keyformat=passphrase`).
    pub fn passphrase(text: impl Into<String>) -> Result<Self, InvalidName> {
        let text = text.into();
        if (8..=512).contains(&text.len()) && !text.contains(['\n', '\r', '\0']) {
            return Ok(Self(Material::Passphrase(text)));
        }
        Err(InvalidName {
            what: "passphrase",
            given: format!("{} bytes", text.len()),
            allowed: "8 to 512 bytes on one line",
        })
    }

    /// The value of the property `keyformat`.
    pub(crate) fn format(&self) -> &'static str {
        match self.0 {
            Material::Raw(_) => "raw",
            Material::Passphrase(_) => "passphrase",
        }
    }

    /// What `zfs` reads where `keylocation` is `prompt`.
    pub(crate) fn material(&self) -> &[u8] {
        match &self.0 {
            Material::Raw(bytes) => bytes,
            Material::Passphrase(text) => text.as_bytes(),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.format())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_and_never_printed() {
        assert_eq!(format!("{:?}", Key::raw(&[7; 32]).unwrap()), "Key(raw)");
        assert_eq!(format!("{:?}", Key::passphrase("correct horse").unwrap()), "Key(passphrase)");
        assert!(Key::raw(&[7; 31]).unwrap_err().to_string().contains("31 bytes"));
        for bad in ["secret!", "two lines\nof it", &"s".repeat(513)] {
            let error = Key::passphrase(bad).unwrap_err().to_string();
            assert!(!error.contains(bad), "{error}");
        }
    }
}
