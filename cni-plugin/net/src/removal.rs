//! Removing links: those of one network that are to go at the same time go together, and nobody waits until the kernel has freed them.
//!
//! A link is gone for everybody as soon as the kernel says so to those who listen (RTNLGRP_LINK, rtnetlink(7)): its name is free, and nothing leads to it.
//! Whoever asked for that is answered only when no processor looks at it any more, which takes several times as long, and holds up nobody else.
//! Several links take the kernel about as long as one, if it is asked for all of them at once: for those of a group (ip-link(8)).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::StreamExt;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};
use rtnetlink::{
    LinkUnspec, MulticastGroup,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use tokio::sync::{Mutex as Turn, oneshot};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
    netlink::{Netlink, News, ok_if},
};

/// The group of links that are about to be removed, in a network's namespace. A link that is to stay is in [`STAYS`].
const GOES: u32 = 0x706f_7274;
/// The group that links are in if nobody says otherwise.
pub(crate) const STAYS: u32 = 0;

/// What is to be removed, by network.
#[derive(Debug, Default)]
pub(crate) struct Removals(Mutex<BTreeMap<u32, Arc<Queue>>>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Vec<Waiting>>,
    turn: Turn<()>,
}

/// Names of links, and who wants to know that they are gone.
type Waiting = (Vec<String>, oneshot::Sender<()>);

impl Removals {
    /// Removes links of a network, and returns when they are gone. It is right if there are none.
    pub async fn remove(&self, vni: u32, namespace: &Namespace, links: Vec<String>) -> Result<()> {
        let queue = Arc::clone(lock(&self.0).entry(vni).or_default());
        let (tell, told) = oneshot::channel();
        lock(&queue.waiting).push((links.clone(), tell));
        {
            // Whoever's turn it is does it for all who have come since.
            let _turn = queue.turn.lock().await;
            let waiting = std::mem::take(&mut *lock(&queue.waiting));
            let all: Vec<&str> = waiting.iter().flat_map(|(links, _)| links).map(String::as_str).collect();
            if !all.is_empty() && remove_links(namespace, &all).await.is_ok() {
                for (_, tell) in waiting {
                    let _ = tell.send(());
                }
            }
        }
        match told.await {
            Ok(()) => Ok(()),
            // Whoever it was could not do it, or came to nothing himself: once more, for the reason.
            Err(_) => remove_links(namespace, &links.iter().map(String::as_str).collect::<Vec<_>>()).await,
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single step: a panic can't leave half of one.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn remove_links(namespace: &Namespace, links: &[&str]) -> Result<()> {
    let (netlink, mut news) = Netlink::open_listening(namespace, &[MulticastGroup::Link])?;
    let mut present = BTreeSet::new();
    for name in links {
        if let Some(link) = netlink.link(name).await? {
            present.insert(link.header.index);
        }
    }
    let mut message = LinkMessage::default();
    match present.first() {
        None => return Ok(()),
        Some(index) if present.len() == 1 => message.header.index = *index,
        Some(_) => {
            for index in &present {
                let goes = LinkUnspec::new_with_index(*index).link_group(GOES).build();
                let set = netlink.set_link(goes, format!("let link {index} be of those that go")).await;
                ok_if(set, libc::ENODEV)?;
            }
            message.attributes.push(LinkAttribute::Group(GOES));
        }
    }
    let inside = namespace.again()?;
    // Once it is begun nothing stops it, nor us.
    let removal = tokio::task::spawn_blocking(move || inside.run(|| remove(message)));
    tokio::select! {
        () = are_told_gone(&mut news, present) => Ok(()),
        removed = removal => {
            let (action, place) = (format!("remove links {}", links.join(", ")), netlink.place().to_owned());
            let fail = |source| Error::Netlink { action, place, source };
            ok_if(removed.unwrap_or_else(|e| Ok(Err(io::Error::other(e))))?.map_err(fail), libc::ENODEV)
        }
    }
}

/// Waits until the kernel has said of each of these links that it is gone. (It says the same of a port that leaves its bridge, to the bridge family.)
async fn are_told_gone(news: &mut News, mut present: BTreeSet<u32>) {
    while let Some((message, _)) = news.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = message.payload
            && link.header.interface_family == AddressFamily::Unspec
        {
            present.remove(&link.header.index);
        }
        if present.is_empty() {
            return;
        }
    }
    // Nothing more will be said: the removal's own answer counts.
    std::future::pending().await
}

/// Removes links of this thread's namespace, and returns when the kernel is done with them. The inner error is the kernel's.
fn remove(links: LinkMessage) -> io::Result<io::Result<()>> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelLink(links));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    Ok(match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    })
}
