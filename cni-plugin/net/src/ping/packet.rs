//! Questions and answers as they are on the wire: ICMP's echo (RFC 792) and ICMPv6's (RFC 4443), which differ in numbers and in what a raw
//! socket shows of them.

use std::net::IpAddr;

use super::Heard;

/// Bytes of an echo message without what it carries: type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
/// Bytes of a question that tell it from others': the message's header, and the secret.
const HEAD: usize = HEADER + 8;
/// Where the checksum is, which the kernel makes of ICMPv6 messages: it counts the addresses, too (RFC 4443, section 2.3).
const CHECKSUM: std::ops::Range<usize> = 2..4;
/// Code of a destination that is unreachable: the packet doesn't fit, and must not be fragmented (RFC 1191, section 4).
const FRAGMENTATION_NEEDED: u8 = 4;

/// Numbers of a family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// Bytes of an IP header without options or extensions, which is how ours are.
    fn ip_header(self) -> usize {
        match self {
            Self::Ipv4 => 20,
            Self::Ipv6 => 40,
        }
    }

    fn question(self) -> u8 {
        match self {
            Self::Ipv4 => 8,
            Self::Ipv6 => 128,
        }
    }

    pub fn answer(self) -> u8 {
        match self {
            Self::Ipv4 => 0,
            Self::Ipv6 => 129,
        }
    }

    /// What a router says that can't pass a packet on: that a destination is unreachable (with a code), or that a packet is too big.
    pub fn refusal(self) -> u8 {
        match self {
            Self::Ipv4 => 3,
            Self::Ipv6 => 2,
        }
    }
}

/// What our questions look like.
#[derive(Clone, Debug)]
pub(super) struct Questions {
    pub family: Family,
    /// What they carry and nobody else knows, so that an answer can't be made up without having seen one.
    pub secret: [u8; 8],
}

impl Questions {
    /// The size of the smallest, as an IP packet, in bytes.
    pub fn smallest(&self) -> u16 {
        (self.family.ip_header() + HEAD) as u16
    }

    /// One whose packet is of `size` bytes, that or more, as the socket is given it.
    pub fn question(&self, size: u16) -> Vec<u8> {
        let size = size.max(self.smallest());
        let mut message = self.head(self.family.question(), size).to_vec();
        message.resize(usize::from(size) - self.family.ip_header(), 0);
        message
    }

    /// What a received packet means, if it is of any of ours. `packet` is how it begins, as a raw socket gives it: with its IP header (raw(7)),
    /// or without (RFC 3542, section 3). `length` is that of all of it.
    pub fn understand(&self, from: IpAddr, packet: &[u8], length: usize) -> Option<Heard> {
        let (icmp, whole) = match self.family {
            Family::Ipv4 => (payload(packet)?, usize::from(word(packet, 2)?)),
            Family::Ipv6 => (packet, length + self.family.ip_header()),
        };
        if *icmp.first()? == self.family.answer() {
            let size = word(icmp, 6)?;
            let is_ours = self.is(self.family.answer(), size, icmp.get(..HEAD)?);
            return (is_ours && whole == usize::from(size)).then_some(Heard::Answer { node: from, size });
        }
        if *icmp.first()? != self.family.refusal() {
            return None;
        }
        match self.family {
            Family::Ipv4 => self.refused(icmp),
            Family::Ipv6 => self.refused_ipv6(icmp),
        }
    }

    fn refused(&self, icmp: &[u8]) -> Option<Heard> {
        if icmp.get(1) != Some(&FRAGMENTATION_NEEDED) {
            return None;
        }
        let packet = icmp.get(HEADER..)?;
        let question = payload(packet)?;
        let size = word(question, 6)?;
        // A router need not quote more than the header, which has the checksum (RFC 792).
        let quoted = question.get(..question.len().min(HEAD))?;
        let is_ours = quoted.len() >= HEADER && self.is(self.family.question(), size, quoted);
        let node = <[u8; 4]>::try_from(packet.get(16..20)?).ok()?.into();
        let carries = word(icmp, 6).filter(|carries| *carries > 0);
        is_ours.then_some(Heard::TooBig { node, size, carries })
    }

    /// A router quotes as much as fits into 1280 bytes (RFC 4443, section 3.2).
    fn refused_ipv6(&self, icmp: &[u8]) -> Option<Heard> {
        let packet = icmp.get(HEADER..)?;
        let question = packet.get(self.family.ip_header()..)?;
        let size = word(question, 6)?;
        let is_ours = self.is(self.family.question(), size, question.get(..HEAD)?);
        let node = <[u8; 16]>::try_from(packet.get(24..40)?).ok()?.into();
        let carries = u32::from_be_bytes(icmp.get(4..8)?.try_into().ok()?);
        let carries = u16::try_from(carries).ok().filter(|carries| *carries > 0);
        is_ours.then_some(Heard::TooBig { node, size, carries })
    }

    /// Whether a message that begins so is one of ours.
    fn is(&self, kind: u8, size: u16, begin: &[u8]) -> bool {
        let mut begin = begin.to_vec();
        if self.family == Family::Ipv6
            && let Some(checksum) = begin.get_mut(CHECKSUM)
        {
            checksum.fill(0);
        }
        self.head(kind, size).starts_with(&begin)
    }

    /// How a message begins; what follows is zeros. The sequence number is the packet's size.
    fn head(&self, kind: u8, size: u16) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[0] = kind;
        head[6..HEADER].copy_from_slice(&size.to_be_bytes());
        head[HEADER..].copy_from_slice(&self.secret);
        if self.family == Family::Ipv4 {
            let checksum = checksum(&head);
            head[CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
        }
        head
    }
}

/// What is behind a packet's IPv4 header.
fn payload(packet: &[u8]) -> Option<&[u8]> {
    packet.get(4 * usize::from(packet.first()? & 0x0f)..)
}

/// The sixteen bits at a place.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The Internet checksum (RFC 1071) of a message of even length.
pub(crate) fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const BOTH: [Family; 2] = [Family::Ipv4, Family::Ipv6];

    fn node(family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => Ipv4Addr::new(192, 0, 2, 2).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).into(),
        }
    }

    fn router(family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => Ipv4Addr::new(192, 0, 2, 254).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0xfe).into(),
        }
    }

    fn ours(family: Family) -> Questions {
        Questions { family, secret: [0xff, 0xff, 0xfe, 1, 2, 3, 4, 5] }
    }

    fn others(family: Family) -> Questions {
        Questions { family, secret: [7; 8] }
    }

    /// An IP packet to [`node`] that says it is so long.
    fn packet(family: Family, length: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; family.ip_header()];
        match node(family) {
            IpAddr::V4(node) => {
                packet[0] = 0x45;
                packet[2..4].copy_from_slice(&length.to_be_bytes());
                packet[16..].copy_from_slice(&node.octets());
            }
            IpAddr::V6(node) => {
                packet[0] = 0x60;
                packet[4..6].copy_from_slice(&length.saturating_sub(40).to_be_bytes());
                packet[24..].copy_from_slice(&node.octets());
            }
        }
        [packet, payload.to_vec()].concat()
    }

    /// As the kernel sends it, and a router quotes it.
    fn with_checksum(family: Family, mut message: Vec<u8>) -> Vec<u8> {
        if family == Family::Ipv6 {
            message[CHECKSUM].copy_from_slice(&[0x12, 0x34]);
        }
        message
    }

    /// As the socket gives a packet of that length whose message begins so.
    fn heard(own: &Questions, from: IpAddr, length: u16, message: &[u8]) -> Option<Heard> {
        match own.family {
            Family::Ipv4 => own.understand(from, &packet(own.family, length, message), length.into()),
            Family::Ipv6 => own.understand(from, message, usize::from(length) - own.family.ip_header()),
        }
    }

    #[test]
    fn a_message_sums_up_to_nothing() {
        let own = ours(Family::Ipv4);
        for kind in [own.family.question(), own.family.answer()] {
            for size in [own.smallest(), 1500, 9050, u16::MAX] {
                assert_eq!(checksum(&own.head(kind, size)), 0);
            }
        }
    }

    #[test]
    fn a_question_is_as_large_as_it_is_to_be() {
        for (family, smallest) in [(Family::Ipv4, 36), (Family::Ipv6, 56)] {
            let own = ours(family);
            assert_eq!(own.smallest(), smallest);
            for (asked, size) in [(0, smallest), (1500, 1500), (u16::MAX, u16::MAX)] {
                assert_eq!(own.question(asked).len() + family.ip_header(), usize::from(size));
            }
        }
    }

    #[test]
    fn an_answer_counts_if_it_is_ours_and_whole() {
        for family in BOTH {
            let (own, node) = (ours(family), node(family));
            let reply = with_checksum(family, own.head(family.answer(), 1500).to_vec());
            assert_eq!(heard(&own, node, 1500, &reply), Some(Heard::Answer { node, size: 1500 }));
            assert_eq!(heard(&own, node, 1400, &reply), None, "it was cut on its way");
            let question = with_checksum(family, own.head(family.question(), 1500).to_vec());
            assert_eq!(heard(&own, node, 1500, &question), None, "a question");
            assert_eq!(heard(&others(family), node, 1500, &reply), None);
            for end in 0..HEAD {
                assert_eq!(heard(&own, node, 1500, &reply[..end]), None, "{end} bytes");
            }
        }
    }

    /// What a router says to a question of 1500 bytes of which it quotes so much.
    fn refusal(family: Family, carries: u16, quoted: &[u8]) -> Vec<u8> {
        let code = if family == Family::Ipv4 { FRAGMENTATION_NEEDED } else { 0 };
        let mut icmp = vec![family.refusal(), code, 0, 0, 0, 0];
        icmp.extend(carries.to_be_bytes());
        icmp.extend(packet(family, 1500, quoted));
        icmp
    }

    #[test]
    fn a_router_is_believed_that_quotes_our_question() {
        for family in BOTH {
            let own = ours(family);
            let told = |carries, quoted: &[u8]| {
                let icmp = refusal(family, carries, &with_checksum(family, quoted.to_vec()));
                heard(&own, router(family), 600, &icmp)
            };
            let question = own.head(family.question(), 1500);
            let too_big = |carries| Some(Heard::TooBig { node: node(family), size: 1500, carries });
            assert_eq!(told(1420, &question), too_big(Some(1420)));
            assert_eq!(told(0, &question), too_big(None), "a router from before RFC 1191");
            assert_eq!(told(1420, &question[..HEADER - 1]), None);
            assert_eq!(told(1420, &others(family).head(family.question(), 1500)), None);
            // Without the secret the checksum tells, where it doesn't depend on what we don't know.
            let least = if family == Family::Ipv4 { too_big(Some(1420)) } else { None };
            assert_eq!(told(1420, &question[..HEADER]), least, "the least that is quoted");
        }
    }

    #[test]
    fn what_a_router_says_of_more_than_fits_is_no_size() {
        let own = ours(Family::Ipv6);
        let mut icmp = refusal(Family::Ipv6, 1420, &own.head(own.family.question(), 1500));
        icmp[4..8].copy_from_slice(&70_000u32.to_be_bytes());
        let expected = Heard::TooBig { node: node(own.family), size: 1500, carries: None };
        assert_eq!(heard(&own, router(own.family), 600, &icmp), Some(expected));
    }
}
