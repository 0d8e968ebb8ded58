//! Amounts for people.

use std::fmt;

/// Bytes: `12Mi`, `1.5Gi`; three digits at most before the unit.
pub struct Human(pub i64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        let (mut unit, mut tenths) = (0, i128::from(self.0) * 10);
        while tenths >= 10_240 && unit < UNITS.len() - 1 {
            tenths /= 1024;
            unit += 1;
        }
        match tenths % 10 {
            tenth if tenth != 0 && tenths < 1000 => write!(f, "{}.{tenth}{}", tenths / 10, UNITS[unit]),
            _ => write!(f, "{}{}", tenths / 10, UNITS[unit]),
        }
    }
}

/// Milliseconds: `850 ms`, `2.3 s`, `4 min 10 s`.
pub struct Time(pub i64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            milliseconds @ ..1000 => write!(f, "{milliseconds} ms"),
            milliseconds @ ..60_000 => write!(f, "{}.{} s", milliseconds / 1000, milliseconds % 1000 / 100),
            milliseconds => write!(f, "{} min {} s", milliseconds / 60_000, milliseconds % 60_000 / 1000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        let text = [Human(0), Human(1023), Human(3 << 29), Human(1_000_000_000)].map(|bytes| bytes.to_string());
        assert_eq!(text, ["0", "1023", "1.5Gi", "953Mi"]);
        let text = [Time(850), Time(2345), Time(250_000)].map(|time| time.to_string());
        assert_eq!(text, ["850 ms", "2.3 s", "4 min 10 s"]);
    }
}
