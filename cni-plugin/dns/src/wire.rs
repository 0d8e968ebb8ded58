//! Messages as bytes, where parsing and writing them anew would change what isn't ours.

use std::ops::Range;

/// Bytes of a message's header (RFC 1035, 4.1.1).
pub(crate) const HEADER: usize = 12;
/// Bytes of a question after its name: type and class.
pub(crate) const QUESTION_TAIL: usize = 4;
/// Bytes of the longest name (RFC 1035, 3.1).
pub(crate) const LONGEST_NAME: usize = 255;
/// Bytes of a datagram that every asker takes (RFC 1035, 4.2.1).
pub(crate) const CLASSIC: usize = 512;
/// Types and classes of records (RFC 1035, 3.2; RFC 3596, 2.1).
pub(crate) const A: u16 = 1;
pub(crate) const AAAA: u16 = 28;
pub(crate) const IN: u16 = 1;
/// Bytes of a record after its name and before its data: type, class, TTL, length.
const RECORD_HEAD: usize = 10;
/// The type of the record that carries EDNS, whose TTL is no TTL (RFC 6891, 6.1.3).
pub(crate) const OPT: u16 = 41;

/// Where the name of the first question is; none if it is cut or compressed.
pub(crate) fn question_name(packet: &[u8]) -> Option<Range<usize>> {
    let (end, is_compressed) = skip_name(packet, HEADER)?;
    (!is_compressed).then_some(HEADER..end)
}

/// The name of the first question with dots, for a person; bytes that are no printable ASCII as `?`.
pub(crate) fn question_text(packet: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = question_name(packet).and_then(|name| packet.get(name)).unwrap_or_default();
    while let Some((length, after)) = rest.split_first().filter(|(length, _)| **length > 0) {
        let (label, next) = after.split_at_checked(usize::from(*length)).unwrap_or((after, &[]));
        text.extend(label.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }));
        text.push('.');
        rest = next;
    }
    text
}

/// The type of the first question; none if its name is cut or compressed.
pub(crate) fn question_type(packet: &[u8]) -> Option<u16> {
    if number16(packet, 4)? == 0 {
        return None;
    }
    number16(packet, question_name(packet)?.end)
}

/// The four bits in the header (RFC 1035, 4.1.1), without what EDNS adds.
pub(crate) fn response_code(packet: &[u8]) -> Option<u8> {
    packet.get(3).map(|byte| byte & 0x0f)
}

/// How many records the answer has.
pub(crate) fn answers(packet: &[u8]) -> Option<u16> {
    number16(packet, 6)
}

/// Whether the reply was cut to fit a datagram.
pub(crate) fn is_truncated(packet: &[u8]) -> bool {
    packet.get(2).is_some_and(|byte| byte & 0x02 != 0)
}

/// Replaces each record's TTL; none, and nothing more is changed, where the message can't be read on.
pub(crate) fn map_ttls(packet: &mut [u8], new: impl Fn(u32) -> u32) -> Option<()> {
    let count = |packet: &[u8], at| number16(packet, at).map(usize::from);
    let questions = count(packet, 4)?;
    let records = count(packet, 6)? + count(packet, 8)? + count(packet, 10)?;
    let mut at = HEADER;
    for _ in 0..questions {
        at = skip_name(packet, at)?.0 + QUESTION_TAIL;
    }
    for _ in 0..records {
        let head = skip_name(packet, at)?.0;
        let length = count(packet, head + 8)?;
        let type_ = number16(packet, head)?;
        let ttl = packet.get_mut(head + 4..head + 8)?;
        if type_ != OPT {
            let old = u32::from_be_bytes(<[u8; 4]>::try_from(&*ttl).ok()?);
            ttl.copy_from_slice(&new(old).to_be_bytes());
        }
        at = head + RECORD_HEAD + length;
    }
    Some(())
}

/// Whether a label of a Kubernetes name, or of a service's (RFC 2782), may have it.
pub(crate) fn is_of_names(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// Where a name ends that begins at `at`, and whether by a pointer (RFC 1035, 4.1.4).
fn skip_name(packet: &[u8], mut at: usize) -> Option<(usize, bool)> {
    loop {
        match *packet.get(at)? {
            0 => return Some((at + 1, false)),
            length @ 1..=63 => at += 1 + usize::from(length),
            192.. => return Some((at + 2, true)),
            _ => return None,
        }
    }
}

fn number16(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question for `ab.`, and two records: an A by a pointer with TTL 60, and OPT with a "TTL" of flags.
    const MESSAGE: &[u8] = b"\x00\x01\x81\x80\x00\x01\x00\x01\x00\x00\x00\x01\x02ab\x00\x00\x01\x00\x01\
        \xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x0a\x00\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x00";

    #[test]
    fn ttls_are_changed_and_nothing_else() {
        let mut message = MESSAGE.to_vec();
        assert_eq!(map_ttls(&mut message, |ttl| ttl - 12), Some(()));
        let differ: Vec<usize> = (0..message.len()).filter(|at| message[*at] != MESSAGE[*at]).collect();
        assert_eq!((differ, message[29]), (vec![29], 48));
        for length in 0..MESSAGE.len() {
            assert_eq!(map_ttls(&mut MESSAGE[..length].to_vec(), |ttl| ttl), None, "cut at {length}");
        }
    }

    #[test]
    fn the_name_of_the_question() {
        assert_eq!(question_text(MESSAGE), "ab.");
        assert_eq!((question_name(MESSAGE), question_type(MESSAGE)), (Some(12..16), Some(1)));
        assert_eq!((response_code(MESSAGE), answers(MESSAGE), is_truncated(MESSAGE)), (Some(0), Some(1), false));
        assert_eq!(question_name(&MESSAGE[..15]), None);
        assert_eq!(question_name(b"\0\0\0\0\0\x01\0\0\0\0\0\0\xc0\x0c"), None);
    }
}
