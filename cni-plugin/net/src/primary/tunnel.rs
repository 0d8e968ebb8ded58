//! The way to other nodes' pods: one VXLAN device, and for each block of another node a route, a neighbour and a forwarding entry.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, link::LinkMessage, neighbour::NeighbourState};
use rtnetlink::{
    LinkUnspec,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
};

use super::{DEVICE, PodNetwork, VNI};
use crate::{
    Mac,
    error::Result,
    forwarding::{entry_facts, neighbour, neighbour_to_remove, tunnel_entry},
    mac::node_mac,
    namespace::Namespace,
    netlink::{Netlink, link_facts, ok_if},
    network::{is_vxlan, vxlan},
    sysctl,
};

/// The MAC of a node's tunnel: who knows the node's address knows it.
fn tunnel_mac(vtep: IpAddr) -> Mac {
    node_mac(DEVICE, vtep)
}

/// What stands for a node on the tunnel: the first address of each of its blocks, which no pod has.
fn itself(block: IpNet) -> IpAddr {
    block.network()
}

pub(super) async fn ensure(host: &Namespace, wanted: &PodNetwork) -> Result<()> {
    let netlink = Netlink::open(host)?;
    let index = ensure_device(&netlink, host, wanted).await?;
    netlink.set_addresses(index, wanted.blocks.iter().map(|block| IpNet::from(itself(*block)))).await?;
    for block in &wanted.blocks {
        // What is for a pod that isn't there goes nowhere, and not by the default route.
        netlink.add_unreachable(*block).await?;
    }
    follow(&netlink, index, wanted).await
}

pub(super) async fn remove(host: &Namespace) -> Result<()> {
    let netlink = Netlink::open(host)?;
    if let Some(link) = netlink.link(DEVICE).await? {
        for own in netlink.addresses(link.header.index).await? {
            netlink.remove_unreachable_from(own.addr()).await?;
        }
    }
    netlink.remove_link(DEVICE).await
}

async fn ensure_device(netlink: &Netlink, host: &Namespace, wanted: &PodNetwork) -> Result<u32> {
    if let Some(link) = netlink.link(DEVICE).await?
        && !is_vxlan(&link, VNI, wanted.vtep, wanted.port)
    {
        netlink.remove_link(DEVICE).await?;
    }
    if netlink.link(DEVICE).await?.is_none() {
        let device = vxlan(DEVICE, VNI, wanted.vtep, wanted.port).build();
        let action = format!("make VXLAN device {DEVICE} from {} to port {}", wanted.vtep, wanted.port);
        netlink.add_link(device, action).await?;
    }
    let key = |key: &str| format!("ipv6/conf/{DEVICE}/{key}");
    let disabled = if wanted.blocks.iter().any(|block| block.addr().is_ipv6()) { "0" } else { "1" };
    let (generation, router, without) = (key("addr_gen_mode"), key("accept_ra"), key("disable_ipv6"));
    sysctl::set(host, &[(&generation, "1"), (&router, "0"), (&without, disabled)])?;
    let index = netlink.index(DEVICE).await?;
    let mac = tunnel_mac(wanted.vtep).0;
    // Asked first: a change of the MAC would flush neighbours.
    if !netlink.link(DEVICE).await?.is_some_and(|link| is_as_wanted(&link, &mac, wanted.mtu)) {
        let up = LinkUnspec::new_with_index(index).address(mac.to_vec()).mtu(wanted.mtu).up().build();
        netlink.set_link(up, format!("bring {DEVICE} up with MTU {}", wanted.mtu)).await?;
    }
    Ok(index)
}

fn is_as_wanted(link: &LinkMessage, mac: &[u8], mtu: u32) -> bool {
    let is_up = link.header.flags.contains(netlink_packet_route::link::LinkFlags::Up);
    is_up && link_facts(link).0 == Some(mac) && link_facts(link).1 == Some(mtu)
}

/// Makes entries and routes those of the other nodes. What leads somewhere comes after what it needs, and goes before it.
async fn follow(netlink: &Netlink, index: u32, wanted: &PodNetwork) -> Result<()> {
    let others = || wanted.others.iter().flat_map(|other| other.blocks.iter().map(move |block| (other.vtep, *block)));
    let routes: BTreeSet<(IpNet, IpAddr)> = others().map(|(_, block)| (block, itself(block))).collect();
    let neighbours: BTreeSet<(IpAddr, Mac)> = others().map(|(vtep, block)| (itself(block), tunnel_mac(vtep))).collect();
    let entries: BTreeSet<(Mac, IpAddr)> = others().map(|(vtep, _)| (tunnel_mac(vtep), vtep)).collect();

    let there: BTreeSet<(IpNet, IpAddr)> = netlink.gateways(index).await?.into_iter().collect();
    for (block, _) in there.iter().filter(|(block, _)| !routes.iter().any(|(wanted, _)| wanted == block)) {
        netlink.remove_route(index, *block).await?;
    }
    let (known_neighbours, known_entries) = known(netlink, index).await?;
    for (address, _) in known_neighbours.iter().filter(|(known, _)| !neighbours.iter().any(|(it, _)| it == known)) {
        let entry = RouteNetlinkMessage::DelNeighbour(neighbour_to_remove(index, *address));
        ok_if(netlink.send(entry, 0, format!("remove neighbour {address}")).await, libc::ENOENT)?;
    }
    for (mac, vtep) in known_entries.difference(&entries) {
        let entry = RouteNetlinkMessage::DelNeighbour(tunnel_entry(index, *mac, *vtep));
        ok_if(netlink.send(entry, 0, format!("forget node {vtep}")).await, libc::ENOENT)?;
    }

    let set = NLM_F_CREATE | NLM_F_REPLACE;
    for (mac, vtep) in entries.difference(&known_entries) {
        let entry = RouteNetlinkMessage::NewNeighbour(tunnel_entry(index, *mac, *vtep));
        netlink.send(entry, set, format!("forward {mac} to {vtep}")).await?;
    }
    for (address, mac) in neighbours.difference(&known_neighbours) {
        let entry = RouteNetlinkMessage::NewNeighbour(neighbour(index, *address, *mac));
        netlink.send(entry, set, format!("add neighbour {address}")).await?;
    }
    for (block, via) in routes.difference(&there) {
        netlink.add_onlink_route(index, *block, *via).await?;
    }
    Ok(())
}

/// The device's neighbours and forwarding entries.
async fn known(netlink: &Netlink, index: u32) -> Result<(BTreeSet<(IpAddr, Mac)>, BTreeSet<(Mac, IpAddr)>)> {
    let (mut neighbours, mut entries) = (BTreeSet::new(), BTreeSet::new());
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for entry in netlink.neighbours(family).await? {
            if entry.header.ifindex == index
                && entry.header.state == NeighbourState::Permanent
                && let (Some(mac), Some(address)) = entry_facts(&entry)
            {
                neighbours.insert((address, mac));
            }
        }
    }
    for entry in netlink.neighbours(AddressFamily::Bridge).await? {
        if entry.header.ifindex == index
            && let (Some(mac), Some(vtep)) = entry_facts(&entry)
        {
            entries.insert((mac, vtep));
        }
    }
    Ok((neighbours, entries))
}
