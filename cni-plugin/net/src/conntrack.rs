//! Flows of datagrams as the kernel follows them (linux/netfilter/nfnetlink_conntrack.h). What was translated in the first packet of one is in all
//! later ones, whatever the rules say by then, for as long as packets come.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use rtnetlink::{
    packet_core::{
        DefaultNla, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
        NlasIterator, parse_ip, parse_u16_be,
    },
    sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_NETFILTER},
};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
};

/// `NFNL_SUBSYS_CTNETLINK` (linux/netfilter/nfnetlink.h) with `IPCTNL_MSG_CT_NEW`, `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const NEW: u16 = 1 << 8;
const GET: u16 = NEW | 1;
const DELETE: u16 = NEW | 2;
/// Bytes of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const FAMILY: usize = 4;
/// `CTA_TUPLE_ORIG`, `CTA_TUPLE_REPLY` and `CTA_ID`: what was sent, what is answered, and which flow it is.
const SENT: u16 = 1;
const ANSWERED: u16 = 2;
const ID: u16 = 12;
/// Of a tuple: `CTA_TUPLE_IP`, with `CTA_IP_V4_SRC`, `CTA_IP_V4_DST`, `CTA_IP_V6_SRC` and `CTA_IP_V6_DST`; `CTA_TUPLE_PROTO`, with
/// `CTA_PROTO_NUM`, `CTA_PROTO_SRC_PORT` and `CTA_PROTO_DST_PORT`.
const IP: u16 = 1;
const SOURCE: [u16; 2] = [1, 3];
const DESTINATION: [u16; 2] = [2, 4];
const PROTOCOL: u16 = 2;
const NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const UDP: u8 = 17;

/// A flow of UDP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Flow {
    /// Where its sender sends to.
    pub to: SocketAddr,
    /// Who answers, which is another one if the destination is translated.
    pub by: SocketAddr,
}

/// Makes the kernel forget flows, so that their next packet is one of a new flow. Reads all of them. Blocks its thread.
pub(crate) fn forget(namespace: &Namespace, is_stale: impl Fn(&Flow) -> bool + Send + Sync) -> Result<()> {
    let done = namespace.run(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let mut stale = Vec::new();
        ask(&socket, &request(GET, NLM_F_DUMP, &[0; FAMILY], &[]), |message| {
            if parsed(message).is_some_and(|flow| is_stale(&flow)) {
                stale.push(message.to_vec());
            }
        })?;
        for message in &stale {
            let names = [SENT, ID].map(|kind| attribute(&message[FAMILY..], kind).map(|it| DefaultNla::new(kind, it)));
            let names: Vec<DefaultNla> = names.into_iter().flatten().collect();
            match ask(&socket, &request(DELETE, NLM_F_ACK, &message[..FAMILY], &names), |_| {}) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(())
    });
    done.map_err(|error| match error {
        Error::Namespace { path, source, .. } => {
            Error::Netlink { action: "forget flows".to_owned(), place: path.display().to_string(), source }
        }
        other => other,
    })
}

/// Sends a request; hands on what follows the header of each message until the kernel says that it is done, or why it isn't.
fn ask(socket: &Socket, request: &[u8], mut message: impl FnMut(&[u8])) -> io::Result<()> {
    socket.send_to(request, &NetlinkAddress::new(0, 0), 0)?;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let buffer = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let payload = buffer.payload();
            match buffer.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = payload.first_chunk().map_or(-libc::EBADMSG, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) };
                }
                NEW if payload.len() >= FAMILY => message(payload),
                _ => {}
            }
            // At least a header's.
            let length = (buffer.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn request(kind: u16, flags: u16, family: &[u8], attributes: &[DefaultNla]) -> Vec<u8> {
    let mut message = vec![0; HEADER];
    message.extend(family);
    let at = message.len();
    message.resize(at + attributes.buffer_len(), 0);
    attributes.emit(&mut message[at..]);
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    message
}

/// The flow of a message; none if it isn't UDP's.
fn parsed(message: &[u8]) -> Option<Flow> {
    let attributes = message.get(FAMILY..)?;
    let sent = attribute(attributes, SENT)?;
    if attribute(&attribute(&sent, PROTOCOL)?, NUMBER)? != [UDP] {
        return None;
    }
    let answered = attribute(attributes, ANSWERED)?;
    Some(Flow { to: end(&sent, DESTINATION, DESTINATION_PORT)?, by: end(&answered, SOURCE, SOURCE_PORT)? })
}

/// One end of a tuple.
fn end(tuple: &[u8], address: [u16; 2], port: u16) -> Option<SocketAddr> {
    let ip = attribute(tuple, IP)?;
    let address: IpAddr = parse_ip(&address.iter().find_map(|kind| attribute(&ip, *kind))?).ok()?;
    let port = parse_u16_be(&attribute(&attribute(tuple, PROTOCOL)?, port)?).ok()?;
    Some(SocketAddr::new(address, port))
}

/// What an attribute of a kind has.
fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes).flatten().find(|it| it.kind() == kind).map(|it| it.value().to_vec())
}
