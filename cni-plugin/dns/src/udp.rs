//! A server's datagrams: a thread that waits for them and answers what it can at once; tasks answer the rest.
//!
//! A thread that waits in the system call itself is woken half as late as a task is by way of the runtime's poll.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::Instant;

use rustix::net::{Shutdown, shutdown};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::answer::{Decision, Forward, Transport};
use crate::batch::{Inbox, Outbox};
use crate::limit::Place;
use crate::metrics::Source;
use crate::server::{AFTER_FAILURE, Server};

/// A question for the upstreams.
struct Asked {
    query: Forward,
    peer: SocketAddr,
    begun: Instant,
    _place: Place,
}

/// The thread, which ends with this.
struct Listener {
    socket: Arc<UdpSocket>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // It ends the wait and says ENOTCONN (inet_shutdown in net/ipv4/af_inet.c).
        let _ = shutdown(&self.socket, Shutdown::Both);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a DNS server's thread has panicked");
        }
    }
}

/// Answers what comes by `socket`, until it is dropped; no thread is left then.
///
/// # Errors
/// When the thread can't be started.
pub(crate) async fn serve(server: Arc<Server>, socket: UdpSocket) -> io::Result<()> {
    let (socket, is_over) = (Arc::new(socket), Arc::new(AtomicBool::new(false)));
    // No more are under way than there are places.
    let (ask, mut asked) = mpsc::unbounded_channel();
    let listen = {
        let (server, socket, is_over) = (Arc::clone(&server), Arc::clone(&socket), Arc::clone(&is_over));
        move || listen(&server, &socket, &ask, &is_over)
    };
    let thread = Some(Builder::new().name(format!("dns {}", server.network)).spawn(listen)?);
    let listener = Listener { socket, is_over, thread };
    let mut forwarding = JoinSet::new();
    while let Some(Asked { query, peer, begun, _place: place }) = asked.recv().await {
        while forwarding.try_join_next().is_some() {}
        let (server, socket) = (Arc::clone(&server), Arc::clone(&listener.socket));
        forwarding.spawn(async move {
            if let Some(reply) = server.forward(&query, peer, Transport::Udp, begun).await {
                Outbox::of(reply, peer).send_now(&socket);
            }
            drop(place);
        });
    }
    Ok(())
}

fn listen(server: &Server, socket: &UdpSocket, ask: &mpsc::UnboundedSender<Asked>, is_over: &AtomicBool) {
    let (mut inbox, mut outbox) = (Inbox::default(), Outbox::default());
    loop {
        let filled = inbox.fill(socket);
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = filled {
            tracing::debug!(network = server.network, %error, "receiving failed");
            sleep(AFTER_FAILURE);
            continue;
        }
        let begun = Instant::now();
        for (packet, peer) in inbox.datagrams() {
            let reply = match server.decide(peer, Transport::Udp, packet, begun) {
                Decision::Drop => None,
                Decision::Reply(reply) => {
                    server.answered(peer, Source::Own, &reply, begun);
                    Some(reply)
                }
                Decision::Forward(query) => later_or_now(server, query, peer, begun, ask),
            };
            if let Some(reply) = reply {
                outbox.put(reply, peer);
            }
        }
        outbox.send(socket);
    }
}

/// The reply, if the cache has it or there is no place for one more question; otherwise the question is asked.
fn later_or_now(
    server: &Server,
    query: Forward,
    peer: SocketAddr,
    begun: Instant,
    ask: &mpsc::UnboundedSender<Asked>,
) -> Option<Vec<u8>> {
    if let Some(reply) = server.kept(&query, peer, Transport::Udp, begun) {
        return Some(reply);
    }
    match server.place(peer) {
        Some(_place) => {
            // Nobody takes it any more when the server ends.
            let _ = ask.send(Asked { query, peer, begun, _place });
            None
        }
        None => server.failed(&query, peer, begun),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use crate::{Metrics, Upstream, Zone, ZoneHandle, run};

    /// The agent waits for a server's end before it takes the network's namespace away, and starts it anew on the same address.
    #[tokio::test]
    async fn a_server_that_nobody_asks_ends_at_once_and_gives_its_address_back() {
        let (udp, tcp) = crate::tests::sockets();
        let address = udp.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let zone = ZoneHandle::new(Zone::new(Vec::new()));
        let until = async {
            let _ = stopped.await;
        };
        let server = tokio::spawn(run(udp, tcp, "a".into(), zone, Upstream::default(), Metrics::default(), until));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(std::net::UdpSocket::bind(address).is_err(), "it is not in use");
        stop.send(()).unwrap();
        timeout(Duration::from_secs(8), server).await.expect("in time").unwrap().unwrap();
        std::net::UdpSocket::bind(address).unwrap();
    }
}
