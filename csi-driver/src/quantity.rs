//! Amounts of bytes: Kubernetes quantities in, figures for people out.

use std::fmt;

/// Text that is no amount of bytes.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{given:?} is no amount of bytes: expected a Kubernetes quantity of 1 byte to 8 Ei, such as 1Gi, 500M or 1048576"
)]
pub struct QuantityError {
    given: String,
}

/// The suffixes of a quantity (k8s.io/apimachinery, resource.Quantity) and what they multiply by.
const SUFFIXES: [(&str, u128); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];
/// More decimals than this can't change a whole number of bytes that fits the result.
const MAX_DIGITS: usize = 18;

/// Bytes of a Kubernetes quantity, rounded up to a whole byte: at least 1, at most `i64::MAX`.
///
/// # Errors
/// When the text is no such quantity.
pub fn bytes(text: &str) -> Result<i64, QuantityError> {
    parse(text).ok_or_else(|| QuantityError { given: text.to_owned() })
}

fn parse(text: &str) -> Option<i64> {
    let (number, factor) = match text.split_once(['e', 'E']) {
        Some((number, exponent)) if !exponent.is_empty() && exponent != "i" => {
            (number, 10u128.checked_pow(exponent.trim_start_matches('+').parse().ok()?)?)
        }
        _ => SUFFIXES.iter().find_map(|(suffix, factor)| text.strip_suffix(suffix).map(|number| (number, *factor)))?,
    };
    let (whole, fraction) = number.strip_prefix('+').unwrap_or(number).split_once('.').unwrap_or((number, ""));
    let whole = whole.strip_prefix('+').unwrap_or(whole);
    if whole.len() + fraction.len() == 0 || whole.len() > MAX_DIGITS + 1 || fraction.len() > MAX_DIGITS {
        return None;
    }
    if !whole.bytes().chain(fraction.bytes()).all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits: u128 = format!("0{whole}{fraction}").parse().ok()?;
    let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let bytes = digits.checked_mul(factor)?.div_ceil(scale);
    i64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// Bytes for people: `12Mi`, `1.5Gi`; three digits at most before the unit.
pub struct Human(pub i64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        let mut unit = 0;
        let mut tenths = i128::from(self.0) * 10;
        while tenths >= 10_240 && unit < UNITS.len() - 1 {
            tenths /= 1024;
            unit += 1;
        }
        match tenths % 10 {
            0 => write!(f, "{}{}", tenths / 10, UNITS[unit]),
            _ if tenths >= 1000 => write!(f, "{}{}", tenths / 10, UNITS[unit]),
            tenth => write!(f, "{}.{}{}", tenths / 10, tenth, UNITS[unit]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, wanted) in [
            ("1", 1),
            ("1Ki", 1024),
            ("1Gi", 1 << 30),
            ("1.5Gi", 3 << 29),
            ("500M", 500_000_000),
            ("1e3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            ("7Ei", 7 << 60),
            ("2E3", 2000),
            ("0.5", 1),
            ("+5k", 5000),
            (".5Ki", 512),
        ] {
            assert_eq!(bytes(text), Ok(wanted), "{text}");
        }
        for text in ["", "0", "-1", "1GiB", "Gi", "1..2", "9Ei", "1 Gi", "1e99", "0x10", "∞"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn for_people() {
        for (bytes, wanted) in
            [(0, "0"), (1023, "1023"), (1024, "1Ki"), (12 << 20, "12Mi"), (3 << 29, "1.5Gi"), (1_000_000_000, "953Mi")]
        {
            assert_eq!(Human(bytes).to_string(), wanted);
        }
    }
}
