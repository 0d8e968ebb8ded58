//! Whether somebody else has changed a namespace's nftables since we did.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::{Dataplane, error::Result, namespace::Namespace};

/// linux/netfilter/nfnetlink.h `NFNL_SUBSYS_NFTABLES`, linux/netfilter/nf_tables.h `NFT_MSG_GETGEN`, `NFT_MSG_NEWGEN` and `NFTA_GEN_ID`.
const NFTABLES: u16 = 10;
const GET: u16 = NFTABLES << 8 | 16;
const NEW: u16 = NFTABLES << 8 | 15;
const ID: u16 = 1;
/// Bytes of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;

/// Counts the changes to all tables of a namespace. What the rules themselves note in sets is none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Generation(u32);

impl Dataplane {
    /// At which change a network's rules are. Another one than after [`Dataplane::filter`] means that they may not be those any more.
    ///
    /// # Errors
    /// [`crate::Error::NoNetwork`] when the network isn't set up here; what the kernel refuses, which may have no nftables.
    pub fn generation(&self, vni: u32) -> Result<Generation> {
        of(&self.namespace(vni)?)
    }
}

fn of(namespace: &Namespace) -> Result<Generation> {
    namespace.run(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.send_to(&request(), &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        answered(&answer)
    })
}

fn request() -> [u8; HEADERS] {
    let mut message = [0; HEADERS];
    message[..4].copy_from_slice(&(HEADERS as u32).to_ne_bytes());
    message[4..6].copy_from_slice(&GET.to_ne_bytes());
    message[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message
}

/// The number of the change in the kernel's answer: an attribute in network order.
fn answered(message: &[u8]) -> io::Result<Generation> {
    let odd = || io::Error::other("nftables: an answer that can't be read");
    let word = |at: usize| message.get(at..at + 4).and_then(|it| it.try_into().ok()).ok_or_else(odd);
    let half =
        |at: usize| message.get(at..at + 2).and_then(|it| it.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(odd);
    match half(4)? {
        NEW => {}
        kind if i32::from(kind) == libc::NLMSG_ERROR => {
            return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(word(16)?).saturating_neg()));
        }
        _ => return Err(odd()),
    }
    let mut at = HEADERS;
    while at < message.len() {
        if half(at + 2)? == ID {
            return Ok(Generation(u32::from_be_bytes(word(at + 4)?)));
        }
        // Never zero, so that this ends.
        at += usize::from(half(at)?).next_multiple_of(4).max(4);
    }
    Err(odd())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `NEWGEN` with a change's number, then the asking program's; as the kernel says it.
    fn message(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = request().to_vec();
        message[4..6].copy_from_slice(&NEW.to_ne_bytes());
        for (kind, value) in attributes {
            message.extend((4 + value.len() as u16).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(*value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        message
    }

    #[test]
    fn the_number_is_found_wherever_it_is() {
        for attributes in [[(ID, [0, 0, 1, 2].as_slice()), (3, b"nft\0")], [(3, b"a\0"), (ID, &[0, 0, 1, 2])]] {
            assert_eq!(answered(&message(&attributes)).unwrap(), Generation(258));
        }
    }

    #[test]
    fn whatever_is_answered_is_read_to_an_end() {
        let mut refused = request();
        refused[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        refused[16..].copy_from_slice(&(-libc::EOPNOTSUPP).to_ne_bytes());
        assert_eq!(answered(&refused).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        let mut odd = message(&[(3, b"nft\0")]);
        assert!(answered(&odd).is_err(), "no number");
        odd[HEADERS] = 0;
        assert!(answered(&odd).is_err(), "an attribute without a length");
        let whole = message(&[(ID, &[0, 0, 1, 2])]);
        for cut in 0..whole.len() {
            assert!(answered(&whole[..cut]).is_err(), "{cut} bytes");
        }
    }
}
