//! A selection's `bandwidth`: the keys of the CNI's conventions (CONVENTIONS.md, "Dynamic Plugin specific fields"), in bits a second and bits.

use std::ops::RangeInclusive;

use portolan_net::{Bandwidth, Limit};
use serde_json::{Map, Value};

use crate::annotation::{AnnotationError, refuse};

/// From 1 kbit/s to 1 Tbit/s.
const RATES: RangeInclusive<u64> = 1_000..=1_000_000_000_000;
/// A bucket holds a frame of the largest MTU that a network may have, and a burst may wait as a whole in the node's memory: 125 MB.
const BURSTS: RangeInclusive<u64> = 80_000..=1_000_000_000;
/// What the burst is where none is given: what goes in 100 ms, and at least some frames.
const PARTS_OF_A_SECOND: u64 = 10;
const LEAST_DEFAULT: u64 = 256_000;

const OBJECT: &str =
    "an object with the fields ingressRate and egressRate, and beside each ingressBurst and egressBurst";
const RATE: &str = "bits a second, a whole number from 1000 to 1000000000000";
const BURST: &str = "bits, a whole number from 80000 to 1000000000";

/// Reads the value of the field.
pub(super) fn parse(value: &Value) -> Result<Bandwidth, AnnotationError> {
    let wrong = || refuse(&format!("bandwidth: {value}"), OBJECT);
    let object = value.as_object().ok_or_else(wrong)?;
    let known = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
    if object.keys().any(|key| !known.contains(&key.as_str())) {
        return Err(wrong());
    }
    let ingress = limit(object, "ingressRate", "ingressBurst")?;
    let egress = limit(object, "egressRate", "egressBurst")?;
    if ingress.is_none() && egress.is_none() {
        return Err(wrong());
    }
    Ok(Bandwidth { ingress, egress })
}

fn limit(object: &Map<String, Value>, rate: &str, burst: &str) -> Result<Option<Limit>, AnnotationError> {
    let number = |field: &str, range: RangeInclusive<u64>, allowed| {
        let read = |value: &Value| {
            let number = value.as_u64().filter(|number| range.contains(number));
            number.ok_or_else(|| refuse(&format!("bandwidth.{field}: {value}"), allowed))
        };
        object.get(field).map(read).transpose()
    };
    let (given_rate, given_burst) = (number(rate, RATES, RATE)?, number(burst, BURSTS, BURST)?);
    match (given_rate, given_burst) {
        (None, None) => Ok(None),
        (None, Some(given)) => {
            Err(refuse(&format!("bandwidth.{burst}: {given}"), "a burst beside the rate of the same direction"))
        }
        (Some(rate), given) => {
            let default = (rate / PARTS_OF_A_SECOND).clamp(LEAST_DEFAULT, *BURSTS.end());
            Ok(Some(Limit { rate, burst: given.unwrap_or(default) }))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_understood() {
        let limit = |rate, burst| Some(Limit { rate, burst });
        let cases = [
            (json!({"ingressRate": 8_000_000}), limit(8_000_000, 800_000), None),
            (json!({"egressRate": 8_000_000, "egressBurst": 80_000}), None, limit(8_000_000, 80_000)),
            (
                json!({"ingressRate": 1000, "egressRate": 1_000_000_000_000_u64}),
                limit(1000, 256_000),
                limit(1_000_000_000_000, 1_000_000_000),
            ),
        ];
        for (given, ingress, egress) in cases {
            assert_eq!(parse(&given), Ok(Bandwidth { ingress, egress }), "{given}");
        }
    }

    #[test]
    fn what_is_refused_and_why() {
        let cases = [
            (json!(8_000_000), "bandwidth: 8000000", "an object with the fields"),
            (json!({}), "bandwidth: {}", "an object with the fields"),
            (json!({"rate": 8_000_000}), "bandwidth: {", "ingressRate and egressRate"),
            (json!({"ingressRate": "10M"}), "bandwidth.ingressRate: \\\"10M\\\"", "from 1000 to 1000000000000"),
            (json!({"ingressRate": 999}), "bandwidth.ingressRate: 999", "from 1000 to 1000000000000"),
            (json!({"egressRate": 1_000_000_000_001_u64}), "bandwidth.egressRate: 1000000000001", "bits a second"),
            (json!({"egressRate": -8_000_000}), "bandwidth.egressRate: -8000000", "bits a second"),
            (json!({"egressRate": 8000.5}), "bandwidth.egressRate: 8000.5", "a whole number"),
            (
                json!({"egressRate": 8000, "egressBurst": 79_999}),
                "bandwidth.egressBurst: 79999",
                "bits, a whole number from 80000",
            ),
            (
                json!({"egressRate": 8000, "egressBurst": 1_000_000_001}),
                "bandwidth.egressBurst: 1000000001",
                "to 1000000000",
            ),
            (
                json!({"egressRate": 8000, "ingressBurst": 80_000}),
                "bandwidth.ingressBurst: 80000",
                "beside the rate of the same direction",
            ),
        ];
        for (given, field, allowed) in cases {
            let error = parse(&given).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains(allowed), "{given}: {error}");
        }
    }
}
