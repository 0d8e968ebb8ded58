//! A route netlink socket in a given namespace, and the few requests that are made over it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkMessage},
    neighbour::NeighbourMessage,
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType},
};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::SocketAddr,
};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
};

/// What the kernel says without being asked.
pub(crate) type News = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// An open socket. It holds its namespace alive until it is dropped.
pub(crate) struct Netlink {
    handle: rtnetlink::Handle,
    place: String,
}

impl Netlink {
    /// Opens a socket in a namespace. Needs a tokio runtime, which then drives it.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        Ok(Self::open_listening(namespace, &[])?.0)
    }

    /// The same, and what the kernel says of itself to these groups (rtnetlink(7)) from now on, until the socket is dropped.
    pub fn open_listening(namespace: &Namespace, groups: &[MulticastGroup]) -> Result<(Self, News)> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, news) = namespace.run(move || {
            let _entered = runtime.enter();
            rtnetlink::new_multicast_connection(groups)
        })?;
        tokio::spawn(connection);
        Ok((Self { handle, place: namespace.path().display().to_string() }, news))
    }

    /// The requests of the netlink library.
    pub fn handle(&self) -> &rtnetlink::Handle {
        &self.handle
    }

    /// Where this socket is, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Makes an error of this socket's namespace.
    pub fn error(&self, action: impl Into<String>, source: rtnetlink::Error) -> Error {
        let source = match source {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        Error::Netlink { action: action.into(), place: self.place.clone(), source }
    }

    /// Sends a message with flags of its own and waits for the kernel's answer.
    pub async fn send(&self, message: RouteNetlinkMessage, flags: u16, action: impl Into<String>) -> Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let action = action.into();
        let mut answers = handle.request(request).map_err(|e| self.error(action.clone(), e))?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(e) = answer.payload
                && e.code.is_some()
            {
                return Err(Error::Netlink { action, place: self.place.clone(), source: e.to_io() });
            }
        }
        Ok(())
    }

    /// All links of the namespace.
    pub async fn links(&self) -> Result<Vec<LinkMessage>> {
        self.handle.link().get().execute().try_collect().await.map_err(|e| self.error("list links", e))
    }

    /// The link of a name.
    pub async fn link(&self, name: &str) -> Result<Option<LinkMessage>> {
        let mut found = std::pin::pin!(self.handle.link().get().match_name(name).execute());
        match found.try_next().await.map_err(|e| self.error(format!("look up link {name}"), e)) {
            Err(e) if e.is_errno(libc::ENODEV) => Ok(None),
            other => other,
        }
    }

    /// The index of a link that has to be there.
    pub async fn index(&self, name: &str) -> Result<u32> {
        let link = self.link(name).await?;
        link.map(|l| l.header.index).ok_or_else(|| Error::NoLink { link: name.to_owned(), place: self.place.clone() })
    }

    /// Makes a link.
    pub async fn add_link(&self, link: LinkMessage, action: impl Into<String>) -> Result<()> {
        self.handle.link().add(link).execute().await.map_err(|e| self.error(action, e))
    }

    /// Changes a link.
    pub async fn set_link(&self, link: LinkMessage, action: impl Into<String>) -> Result<()> {
        self.handle.link().set(link).execute().await.map_err(|e| self.error(action, e))
    }

    /// Removes a link; it is right if there is none.
    pub async fn remove_link(&self, name: &str) -> Result<()> {
        let Some(link) = self.link(name).await? else { return Ok(()) };
        let removed = self.handle.link().del(link.header.index).execute().await;
        match removed.map_err(|e| self.error(format!("remove link {name}"), e)) {
            Err(e) if e.is_errno(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Makes a link have these addresses and no other.
    pub async fn set_addresses(&self, index: u32, wanted: impl Iterator<Item = IpNet> + Clone) -> Result<()> {
        for stale in self.addresses(index).await?.into_iter().filter(|have| !wanted.clone().any(|it| it == *have)) {
            self.remove_address(index, stale).await?;
        }
        for address in wanted {
            self.add_address(index, address).await?;
        }
        Ok(())
    }

    /// Gives a link an address; it is right if it has it. An IPv6 address can be used at once: it was allocated, so nobody is
    /// asked whether he has it too (RFC 4862, section 5.4).
    pub async fn add_address(&self, index: u32, address: IpNet) -> Result<()> {
        let mut request = self.handle.address().add(index, address.addr(), address.prefix_len());
        if let IpNet::V6(_) = address {
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let added = request.execute().await;
        ok_if(added.map_err(|e| self.error(format!("add address {address}"), e)), libc::EEXIST)
    }

    /// Takes an address from a link; it is right if it doesn't have it.
    pub async fn remove_address(&self, index: u32, address: IpNet) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.attributes.push(AddressAttribute::Local(address.addr()));
        let action = format!("remove address {address}");
        let removed = self.send(RouteNetlinkMessage::DelAddress(message), 0, action).await;
        // Without IPv6 no link has an address of it.
        ok_if(ok_if(removed, libc::EADDRNOTAVAIL), libc::EOPNOTSUPP)
    }

    /// A link's addresses, each with its prefix length.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpNet>> {
        let listed = self.handle.address().get().set_link_index_filter(index).execute().try_collect::<Vec<_>>().await;
        let listed = listed.map_err(|e| self.error("list addresses", e))?;
        // `Local` where there is one: of a point-to-point link `Address` is the peer's (linux/if_addr.h).
        let address = |message: &AddressMessage| {
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let own = || {
                message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                })
            };
            IpNet::new(local.or_else(own)?, message.header.prefix_len).ok()
        };
        Ok(listed.iter().filter(|message| message.header.index == index).filter_map(address).collect())
    }

    /// All interfaces' addresses.
    pub async fn all_addresses(&self) -> Result<Vec<IpAddr>> {
        let listed = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let listed = listed.map_err(|e| self.error("list addresses", e))?;
        let address = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        Ok(listed.iter().flat_map(|message| message.attributes.iter().filter_map(address)).collect())
    }

    /// The IPv6 addresses that the namespace takes for its own, by its routes.
    pub async fn local_addresses(&self) -> Result<Vec<IpAddr>> {
        let all = rtnetlink::RouteMessageBuilder::<Ipv6Addr>::new().build();
        let listed = self.handle.route().get(all).execute().try_collect::<Vec<_>>().await;
        let listed = listed.map_err(|e| self.error("list routes", e))?;
        let local = listed.iter().filter(|route| route.header.kind == RouteType::Local);
        let destinations = local.flat_map(|route| &route.attributes).filter_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::from(*address)),
            _ => None,
        });
        Ok(destinations.collect())
    }

    /// A route to a network that is reached directly over a link.
    pub async fn add_link_route(&self, index: u32, to: Ipv4Net) -> Result<()> {
        let route = rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to.network(), to.prefix_len())
            .output_interface(index)
            .scope(RouteScope::Link)
            .build();
        let added = self.handle.route().add(route).replace().execute().await;
        ok_if(added.map_err(|e| self.error(format!("add route to {to}"), e)), libc::EEXIST)
    }

    /// A static route over a link, by a gateway unless what it is to is reached directly; it takes the place of another one to the same.
    pub async fn add_route(&self, index: u32, to: IpNet, via: Option<IpAddr>) -> Result<()> {
        let added = self.handle.route().add(route(index, to, via)).replace().execute().await;
        ok_if(added.map_err(|e| self.error(format!("add route to {to}"), e)), libc::EEXIST)
    }

    /// A static route by a gateway that is taken to be on the link, whatever addresses that has.
    pub async fn add_onlink_route(&self, index: u32, to: IpNet, via: IpAddr) -> Result<()> {
        let mut route = route(index, to, Some(via));
        route.header.flags |= RouteFlags::Onlink;
        let added = self.handle.route().add(route).replace().execute().await;
        added.map_err(|e| self.error(format!("add route to {to}"), e))
    }

    /// A route over a link to what is reached directly; one of that address' family makes the host speak from it.
    pub async fn add_route_from(&self, index: u32, to: IpNet, from: IpAddr) -> Result<()> {
        let mut route = route(index, to, None);
        let source = match (to, from) {
            (IpNet::V4(_), IpAddr::V4(from)) => Some(RouteAddress::Inet(from)),
            (IpNet::V6(_), IpAddr::V6(from)) => Some(RouteAddress::Inet6(from)),
            _ => None,
        };
        route.attributes.extend(source.map(RouteAttribute::PrefSource));
        let added = self.handle.route().add(route).replace().execute().await;
        added.map_err(|e| self.error(format!("add route to {to}"), e))
    }

    /// Nothing is reached by the less special routes than this one.
    pub async fn add_unreachable(&self, to: IpNet) -> Result<()> {
        let added = self.handle.route().add(unreachable(to)).replace().execute().await;
        ok_if(added.map_err(|e| self.error(format!("make {to} unreachable"), e)), libc::EEXIST)
    }

    /// Takes away the routes that say so of what begins with an address.
    pub async fn remove_unreachable_from(&self, first: IpAddr) -> Result<()> {
        for route in self.routes().await? {
            if route.header.kind == RouteType::Unreachable && destination(&route).is_some_and(|to| to.addr() == first) {
                let removed = self.handle.route().del(route).execute().await;
                ok_if(removed.map_err(|e| self.error(format!("forget that {first} is unreachable"), e)), libc::ESRCH)?;
            }
        }
        Ok(())
    }

    /// Where the routes over a link lead.
    pub async fn destinations(&self, index: u32) -> Result<Vec<IpNet>> {
        let routes = self.routes().await?;
        let is_its = |route: &&RouteMessage| route.attributes.contains(&RouteAttribute::Oif(index));
        Ok(routes.iter().filter(is_its).filter_map(destination).collect())
    }

    /// Takes such a route away; it is right if there is none.
    pub async fn remove_route(&self, index: u32, to: IpNet) -> Result<()> {
        let mut route = route(index, to, None);
        // Of whichever scope (rtnetlink(7)).
        route.header.scope = RouteScope::NoWhere;
        let removed = self.handle.route().del(route).execute().await;
        ok_if(removed.map_err(|e| self.error(format!("remove route to {to}"), e)), libc::ESRCH)
    }

    /// The routes over a link that lead by a gateway: to where, and by which.
    pub async fn gateways(&self, index: u32) -> Result<Vec<(IpNet, IpAddr)>> {
        Ok(self.routes().await?.iter().filter_map(|route| gateway_of(route, index)).collect())
    }

    /// All routes of both families.
    async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let mut found = Vec::new();
        let all = [
            rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new().build(),
            rtnetlink::RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for family in all {
            let listed = self.handle.route().get(family).execute().try_collect::<Vec<_>>().await;
            found.extend(listed.map_err(|e| self.error("list routes", e))?);
        }
        Ok(found)
    }

    /// The namespace's neighbours of a family: `Inet` for ARP, `Inet6` for neighbour discovery, `Bridge` for forwarding entries.
    pub async fn neighbours(&self, family: AddressFamily) -> Result<Vec<NeighbourMessage>> {
        let request = self.handle.neighbours().get().set_address_family(family);
        request.execute().try_collect().await.map_err(|e| self.error("list neighbours", e))
    }
}

fn route(index: u32, to: IpNet, via: Option<IpAddr>) -> RouteMessage {
    let scope = if via.is_some() { RouteScope::Universe } else { RouteScope::Link };
    let mut message = match to {
        IpNet::V4(to) => rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to.network(), to.prefix_len())
            .output_interface(index)
            .scope(scope)
            .build(),
        IpNet::V6(to) => rtnetlink::RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to.network(), to.prefix_len())
            .output_interface(index)
            .build(),
    };
    if let Some(via) = via {
        message.attributes.push(RouteAttribute::Gateway(match via {
            IpAddr::V4(via) => RouteAddress::Inet(via),
            IpAddr::V6(via) => RouteAddress::Inet6(via),
        }));
    }
    message
}

fn unreachable(to: IpNet) -> RouteMessage {
    let mut route = route(0, to, None);
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
    route.header.kind = RouteType::Unreachable;
    route.header.scope = RouteScope::Universe;
    route
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(to)) => {
            IpNet::new((*to).into(), route.header.destination_prefix_length).ok()
        }
        RouteAttribute::Destination(RouteAddress::Inet6(to)) => {
            IpNet::new((*to).into(), route.header.destination_prefix_length).ok()
        }
        _ => None,
    })
}

fn gateway_of(route: &RouteMessage, index: u32) -> Option<(IpNet, IpAddr)> {
    let (mut is_its, mut to, mut via) = (false, None, None);
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => is_its = *oif == index,
            RouteAttribute::Destination(destination) => to = address(destination),
            RouteAttribute::Gateway(gateway) => via = address(gateway),
            _ => {}
        }
    }
    let via = via.filter(|_| is_its)?;
    let nowhere = if via.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Some((IpNet::new(to.unwrap_or(nowhere), route.header.destination_prefix_length).ok()?, via))
}

/// Takes one error number for success: what was asked for is so already.
pub(crate) fn ok_if(result: Result<()>, errno: i32) -> Result<()> {
    match result {
        Err(e) if e.is_errno(errno) => Ok(()),
        other => other,
    }
}

/// A link's name.
pub(crate) fn link_name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// A link's MAC address, MTU and bridge.
pub(crate) fn link_facts(link: &LinkMessage) -> (Option<&[u8]>, Option<u32>, Option<u32>) {
    let mut facts = (None, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(mac) => facts.0 = Some(mac.as_slice()),
            LinkAttribute::Mtu(mtu) => facts.1 = Some(*mtu),
            LinkAttribute::Controller(index) => facts.2 = Some(*index),
            _ => {}
        }
    }
    facts
}
