//! Removing links without waiting until the kernel has freed them.
//!
//! A link is gone for everybody as soon as the kernel says so to those who listen (RTNLGRP_LINK, rtnetlink(7)): its name is free, and nothing leads to it.
//! Whoever asked for that is answered only when no processor looks at it any more, which takes several times as long, and holds up nobody else.

use std::io;

use futures::StreamExt;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, link::LinkMessage};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
    netlink::{Netlink, News, ok_if},
};

/// Removes a link, and returns when it is gone. `netlink` is in the namespace and listens to `news` of links. It is right if there is none.
pub(crate) async fn remove_link(
    namespace: &Namespace,
    (netlink, news): (&Netlink, &mut News),
    name: &str,
) -> Result<()> {
    let Some(link) = netlink.link(name).await? else { return Ok(()) };
    let (index, inside) = (link.header.index, namespace.again()?);
    // Once it is begun nothing stops it, nor us.
    let removal = tokio::task::spawn_blocking(move || inside.run(|| remove(index)));
    tokio::select! {
        () = is_told_gone(news, index) => Ok(()),
        removed = removal => {
            let fail = |source| Error::Netlink { action: format!("remove link {name}"), place: netlink.place().to_owned(), source };
            ok_if(removed.unwrap_or_else(|e| Ok(Err(io::Error::other(e))))?.map_err(fail), libc::ENODEV)
        }
    }
}

/// Waits until the kernel says that a link is gone. (It says the same of a port that leaves its bridge, to the bridge family.)
async fn is_told_gone(news: &mut News, index: u32) {
    while let Some((message, _)) = news.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = message.payload
            && link.header.index == index
            && link.header.interface_family == AddressFamily::Unspec
        {
            return;
        }
    }
    // Nothing more will be said: the removal's own answer counts.
    std::future::pending().await
}

/// Removes a link of this thread's namespace, and returns when the kernel is done with it. The inner error is the kernel's.
fn remove(index: u32) -> io::Result<io::Result<()>> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelLink(link));
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
