//! WireGuard devices of the kernel, by generic netlink (linux/wireguard.h).

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::{
    packet_core::{
        DecodeError, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage,
        NetlinkPayload, NetlinkSerializable, ParseableParametrized,
    },
    proto::{ConnectionHandle, new_connection},
    sys::{SocketAddr as NetlinkAddress, protocols::NETLINK_GENERIC},
};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
};

/// Bytes of a Curve25519 key.
const KEY: usize = 32;
/// Peers that are changed by one request: an attribute, which all of them are in, has 64 KiB at most, and a peer needs 116 bytes, or 140 with IPv6.
const PEERS_AT_ONCE: usize = 256;
/// How often a peer that hasn't answered yet is asked for a handshake, in seconds; the kernel asks every five at most.
const KEEPALIVE: u16 = 5;

/// What a node is known by to those that it exchanges encrypted packets with.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; KEY]);

/// What a node proves by that it is who it is. It is in no message and no log.
#[derive(Clone, Eq, PartialEq)]
pub struct PrivateKey([u8; KEY]);

/// A text isn't a key.
#[derive(Debug, thiserror::Error)]
#[error("a key of WireGuard is 32 bytes in base64, 44 characters; {given} characters were given")]
pub struct KeyError {
    given: usize,
}

impl PrivateKey {
    /// A new one of the kernel's random numbers.
    ///
    /// # Errors
    /// When there are no random numbers.
    pub fn generate() -> io::Result<Self> {
        let mut key = [0; KEY];
        let mut filled = 0;
        while let Some(rest) = key.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(Self(key))
    }

    /// As the kernel has it: it sets the bits that Curve25519 wants (RFC 7748, section 5).
    pub(crate) fn clamped(&self) -> Self {
        let mut key = self.0;
        key[0] &= 0xf8;
        key[KEY - 1] = key[KEY - 1] & 0x7f | 0x40;
        Self(key)
    }

    /// As text, for a file that only root reads.
    pub fn reveal(&self) -> String {
        BASE64_STANDARD.encode(self.0)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> std::result::Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> std::result::Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

fn decode(text: &str) -> std::result::Result<[u8; KEY], KeyError> {
    let bytes = BASE64_STANDARD.decode(text).ok();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(KeyError { given: text.len() })
}

/// What the kernel says of a device.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Device {
    pub private: Option<PrivateKey>,
    pub public: Option<PublicKey>,
    pub port: u16,
    pub peers: BTreeMap<PublicKey, PeerState>,
}

/// What the kernel says of a device's peer.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct PeerState {
    /// The addresses that packets to it and from it have inside, with prefix lengths.
    pub allowed: Vec<(IpAddr, u8)>,
    pub keepalive: u16,
    /// Whether there has been a handshake, so that both know each other's key.
    pub connected: bool,
}

/// One change of a device's peers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PeerChange {
    Remove(PublicKey),
    /// The node with this key has this address, inside and outside.
    Set(PublicKey, IpAddr),
    /// It needn't be asked for a handshake any more.
    Settle(PublicKey),
}

/// What makes of a device's peers those that are wanted.
pub(crate) fn changes(have: &BTreeMap<PublicKey, PeerState>, want: &BTreeMap<PublicKey, IpAddr>) -> Vec<PeerChange> {
    // First: an address is one peer's, and a new one would take it from a former with the same.
    let mut changes: Vec<_> =
        have.keys().filter(|key| !want.contains_key(key)).copied().map(PeerChange::Remove).collect();
    for (key, vtep) in want {
        match have.get(key) {
            Some(peer) if peer.allowed == [(*vtep, whole(*vtep))] => {
                if peer.connected && peer.keepalive != 0 {
                    changes.push(PeerChange::Settle(*key));
                }
            }
            _ => changes.push(PeerChange::Set(*key, *vtep)),
        }
    }
    changes
}

/// A generic netlink socket in a namespace.
pub(crate) struct Wireguard {
    handle: ConnectionHandle<GenlMessage<Message>>,
    family: u16,
    place: String,
}

impl Wireguard {
    /// Opens a socket. The kernel must have WireGuard by now: making a device loads it.
    pub async fn open(namespace: &Namespace) -> Result<Self> {
        let place = namespace.path().display().to_string();
        let family = family(namespace).await?;
        Ok(Self { handle: connect(namespace)?, family, place })
    }

    /// What a device is like.
    pub async fn get(&self, device: &str) -> Result<Device> {
        let attributes = vec![WireguardAttribute::IfName(device.to_owned())];
        let message = Message(WireguardMessage { cmd: WireguardCmd::GetDevice, attributes });
        let answers = self.request(message, NLM_F_DUMP, format!("read WireGuard device {device}")).await?;
        let mut found = Device::default();
        answers.into_iter().flat_map(|answer| answer.0.attributes).for_each(|attribute| found.take(attribute));
        Ok(found)
    }

    /// Gives a device its key and its UDP port.
    pub async fn set_key(&self, device: &str, key: &PrivateKey, port: u16) -> Result<()> {
        let attributes = vec![WireguardAttribute::PrivateKey(key.0), WireguardAttribute::ListenPort(port)];
        self.set(device, attributes, format!("set WireGuard device {device}'s key and its UDP port {port}")).await
    }

    /// Changes a device's peers, which listen at a UDP port.
    pub async fn set_peers(&self, device: &str, port: u16, changes: &[PeerChange]) -> Result<()> {
        for part in changes.chunks(PEERS_AT_ONCE) {
            let peers = part.iter().map(|change| peer(*change, port)).collect();
            let attributes = vec![WireguardAttribute::Peers(peers)];
            self.set(device, attributes, format!("set {} peers of WireGuard device {device}", part.len())).await?;
        }
        Ok(())
    }

    async fn set(&self, device: &str, attributes: Vec<WireguardAttribute>, action: String) -> Result<()> {
        let name = WireguardAttribute::IfName(device.to_owned());
        let attributes = [name].into_iter().chain(attributes).collect();
        let message = Message(WireguardMessage { cmd: WireguardCmd::SetDevice, attributes });
        self.request(message, NLM_F_ACK, action).await.map(drop)
    }

    async fn request(&self, message: Message, flags: u16, action: String) -> Result<Vec<Message>> {
        let mut message = GenlMessage::from_payload(message);
        message.set_resolved_family_id(self.family);
        send(&self.handle, message, flags).await.map_err(|source| Error::Netlink {
            action,
            place: self.place.clone(),
            source,
        })
    }
}

impl Device {
    fn take(&mut self, attribute: WireguardAttribute) {
        match attribute {
            WireguardAttribute::PrivateKey(key) => self.private = Some(PrivateKey(key)),
            WireguardAttribute::PublicKey(key) => self.public = Some(PublicKey(key)),
            WireguardAttribute::ListenPort(port) => self.port = port,
            WireguardAttribute::Peers(peers) => peers.into_iter().for_each(|peer| self.take_peer(peer)),
            _ => {}
        }
    }

    /// One that doesn't fit into a message is told in several.
    fn take_peer(&mut self, told: WireguardPeer) {
        let key = told.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::PublicKey(key) => Some(PublicKey(*key)),
            _ => None,
        });
        let Some(key) = key else { return };
        let peer = self.peers.entry(key).or_default();
        for attribute in told.0 {
            match attribute {
                WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.keepalive = seconds,
                WireguardPeerAttribute::LastHandshake(at) => peer.connected = at.seconds != 0 || at.nano_seconds != 0,
                WireguardPeerAttribute::AllowedIps(all) => peer.allowed.extend(all.iter().filter_map(allowed)),
                _ => {}
            }
        }
    }
}

fn allowed(told: &WireguardAllowedIp) -> Option<(IpAddr, u8)> {
    let address = told.iter().find_map(|it| match it {
        WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
        _ => None,
    });
    let prefix = told.iter().find_map(|it| match it {
        WireguardAllowedIpAttr::Cidr(prefix) => Some(*prefix),
        _ => None,
    });
    address.zip(prefix)
}

/// The prefix length of an address alone.
fn whole(address: IpAddr) -> u8 {
    IpNet::from(address).max_prefix_len()
}

fn peer(change: PeerChange, port: u16) -> WireguardPeer {
    let attributes = match change {
        PeerChange::Remove(key) => {
            vec![WireguardPeerAttribute::PublicKey(key.0), WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)]
        }
        PeerChange::Set(key, vtep) => vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
            WireguardPeerAttribute::Endpoint(SocketAddr::new(vtep, port)),
            WireguardPeerAttribute::PersistentKeepalive(KEEPALIVE),
            WireguardPeerAttribute::AllowedIps(vec![WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::Family(match vtep {
                    IpAddr::V4(_) => WireguardAddressFamily::Ipv4,
                    IpAddr::V6(_) => WireguardAddressFamily::Ipv6,
                }),
                WireguardAllowedIpAttr::IpAddr(vtep),
                WireguardAllowedIpAttr::Cidr(whole(vtep)),
            ])]),
        ],
        PeerChange::Settle(key) => vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly),
            WireguardPeerAttribute::PersistentKeepalive(0),
        ],
    };
    WireguardPeer(attributes)
}

/// The number that the kernel has given to the family of WireGuard's messages.
async fn family(namespace: &Namespace) -> Result<u16> {
    let name = Message::family_name();
    let nlas = vec![GenlCtrlAttrs::FamilyName(name.to_owned())];
    let message = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
    let fail = |source| Error::Netlink {
        action: format!("look up generic netlink family {name}"),
        place: namespace.path().display().to_string(),
        source,
    };
    let answers = send(&connect(namespace)?, message, NLM_F_ACK).await.map_err(fail)?;
    let id = answers.into_iter().flat_map(|answer| answer.nlas).find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(id) => Some(id),
        _ => None,
    });
    id.ok_or_else(|| fail(io::ErrorKind::NotFound.into()))
}

/// Opens a socket in a namespace. Needs a tokio runtime, which then drives it.
fn connect<F>(namespace: &Namespace) -> Result<ConnectionHandle<GenlMessage<F>>>
where
    F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + fmt::Debug + Send + Sync + Unpin + 'static,
    GenlMessage<F>: NetlinkSerializable + NetlinkDeserializable,
{
    let runtime = tokio::runtime::Handle::current();
    let (connection, handle, _) = namespace.run(move || {
        let _entered = runtime.enter();
        new_connection::<GenlMessage<F>>(NETLINK_GENERIC)
    })?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Sends a request and waits for all of the kernel's answer.
async fn send<F>(handle: &ConnectionHandle<GenlMessage<F>>, message: GenlMessage<F>, flags: u16) -> io::Result<Vec<F>>
where
    F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + fmt::Debug,
{
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    let kernel = NetlinkAddress::new(0, 0);
    let mut answers = handle.request(request, kernel).map_err(|e| io::Error::other(e.to_string()))?;
    let mut told = Vec::new();
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => told.push(message.into_parts().1),
            NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
            _ => {}
        }
    }
    Ok(told)
}

/// A message of WireGuard that may be shown: the netlink library writes what it sends and hears into the most verbose log.
pub(crate) struct Message(WireguardMessage);

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of WireGuard, {} attributes", self.0.cmd, self.0.attributes.len())
    }
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        WireguardMessage::family_name()
    }

    fn version(&self) -> u8 {
        self.0.version()
    }

    fn command(&self) -> u8 {
        self.0.command()
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(buffer: &[u8], header: GenlHeader) -> std::result::Result<Self, DecodeError> {
        WireguardMessage::parse_with_param(buffer, header).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY_TEXT: &str = "8bdQrVLqiw3ZoHCucNh1YfH0iCWuyStniRr8t7H24Fk=";

    fn key(number: u8) -> PublicKey {
        PublicKey([number; KEY])
    }

    fn vtep(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn vtep_ipv6(last: u16) -> IpAddr {
        [0xfd00, 0, 0, 0, 0, 0, 0, last].into()
    }

    /// As the kernel has a peer that was set.
    fn there(last: u8, connected: bool) -> PeerState {
        PeerState { allowed: vec![(vtep(last), 32)], keepalive: KEEPALIVE, connected }
    }

    #[test]
    fn keys_are_what_wireguard_takes_them_for() {
        assert_eq!(KEY_TEXT.parse::<PublicKey>().unwrap().to_string(), KEY_TEXT);
        let private = PrivateKey::generate().unwrap();
        assert_eq!(private.reveal().parse::<PrivateKey>().unwrap(), private);
        assert_ne!(private, PrivateKey::generate().unwrap());
        for wrong in ["", "AAAA", &KEY_TEXT[1..], "8bdQrVLqiw3ZoHCucNh1YfH0iCWuyStniRr8t7H24F?="] {
            assert!(wrong.parse::<PublicKey>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_private_key_is_not_shown() {
        let private = PrivateKey::generate().unwrap();
        let attributes = vec![WireguardAttribute::PrivateKey(private.0)];
        let message = GenlMessage::from_payload(Message(WireguardMessage { cmd: WireguardCmd::SetDevice, attributes }));
        let device = Device { private: Some(private.clone()), ..Device::default() };
        let bytes = format!("{:?}", private.0);
        for shown in [format!("{private:?}"), format!("{:?}", NetlinkMessage::from(message)), format!("{device:?}")] {
            assert!(!shown.contains(&bytes) && !shown.contains(&private.reveal()), "{shown}");
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let have = BTreeMap::from([(key(1), there(1, false)), (key(2), there(2, true)), (key(3), there(3, true))]);
        let want = BTreeMap::from([(key(1), vtep(1)), (key(2), vtep(2)), (key(4), vtep(3))]);
        let expected = [PeerChange::Remove(key(3)), PeerChange::Settle(key(2)), PeerChange::Set(key(4), vtep(3))];
        assert_eq!(changes(&have, &want), expected);
        let settled = BTreeMap::from([(key(1), PeerState { keepalive: 0, ..there(1, true) })]);
        assert_eq!(changes(&settled, &BTreeMap::from([(key(1), vtep(1))])), []);
        assert_eq!(
            changes(&settled, &BTreeMap::from([(key(1), vtep(9))])),
            [PeerChange::Set(key(1), vtep(9))],
            "moved"
        );
    }

    #[test]
    fn a_node_is_reached_at_its_address_of_either_family() {
        for (vtep, endpoint, length) in [(vtep(7), "192.0.2.7:7795", 32), (vtep_ipv6(7), "[fd00::7]:7795", 128)] {
            let set = peer(PeerChange::Set(key(1), vtep), 7795);
            let at = set.iter().find_map(|attribute| match attribute {
                WireguardPeerAttribute::Endpoint(at) => Some(at.to_string()),
                _ => None,
            });
            assert_eq!(at.as_deref(), Some(endpoint));
            let mut device = Device::default();
            device.take_peer(set);
            let state = device.peers[&key(1)].clone();
            assert_eq!(state.allowed, [(vtep, length)], "nothing else inside");
            let want = BTreeMap::from([(key(1), vtep)]);
            assert_eq!(changes(&device.peers, &want), [], "what is so stays");
            let other = BTreeMap::from([(key(1), vtep_ipv6(8))]);
            assert_eq!(changes(&device.peers, &other), [PeerChange::Set(key(1), vtep_ipv6(8))]);
        }
    }

    /// The kernel refuses a request with an attribute of 64 KiB.
    #[test]
    fn a_request_is_small_enough() {
        for vtep in [vtep(1), vtep_ipv6(1)] {
            let peers: Vec<_> = (0..PEERS_AT_ONCE).map(|_| peer(PeerChange::Set(key(1), vtep), 1)).collect();
            let attribute = WireguardAttribute::Peers(peers);
            assert!(rtnetlink::packet_core::Nla::value_len(&attribute) < usize::from(u16::MAX));
        }
    }

    #[test]
    fn what_the_kernel_tells_is_understood() {
        let mut device = Device::default();
        device.take(WireguardAttribute::ListenPort(7795));
        device.take(WireguardAttribute::PublicKey([7; KEY]));
        device.take(WireguardAttribute::Peers(vec![peer(PeerChange::Set(key(1), vtep(1)), 7795)]));
        assert_eq!((device.port, device.public), (7795, Some(key(7))));
        assert_eq!(device.peers, BTreeMap::from([(key(1), there(1, false))]));
    }
}
