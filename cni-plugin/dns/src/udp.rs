//! A server's datagrams: a thread that waits for them and answers what it can at once, and a thread that waits for the upstreams'
//! answers to the rest.
//!
//! A thread that waits in the system call itself is woken half as late as a task is by way of the runtime's poll. It sends the
//! questions, too, so that the other thread is woken while the upstream is at work.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::Instant;

use rustix::net::{Shutdown, shutdown};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::answer::{Decision, Forward, Transport};
use crate::batch::{Inbox, Outbox};
use crate::forward::Asking;
use crate::limit::Place;
use crate::server::{AFTER_FAILURE, Asker, Server};

/// A question that the upstreams have been asked.
struct Asked {
    query: Forward,
    asker: Asker,
    asking: Asking,
    _place: Place,
}

/// The threads, which end with this.
struct Threads {
    socket: Arc<UdpSocket>,
    is_over: Arc<AtomicBool>,
    /// The one that listens first: with it ends what the other one waits for.
    handles: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // It ends the wait and says ENOTCONN (inet_shutdown in net/ipv4/af_inet.c).
        let _ = shutdown(&self.socket, Shutdown::Both);
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a DNS server's thread has panicked");
            }
        }
    }
}

/// Answers what comes by `socket`, until it is dropped; no thread is left then.
///
/// # Errors
/// When a thread can't be started.
pub(crate) async fn serve(server: Arc<Server>, socket: UdpSocket) -> io::Result<()> {
    let (socket, is_over) = (Arc::new(socket), Arc::new(AtomicBool::new(false)));
    // No more are under way than there are places.
    let (ask, asked) = mpsc::unbounded_channel();
    let (ended, end) = oneshot::channel::<()>();
    let listen = {
        let (server, socket, is_over) = (Arc::clone(&server), Arc::clone(&socket), Arc::clone(&is_over));
        move || listen(&server, &socket, &ask, &is_over)
    };
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let name = format!("dns {}", server.network);
    let mut threads = Threads { socket: Arc::clone(&socket), is_over, handles: Vec::new() };
    threads.handles.push(Builder::new().name(name.clone()).spawn(listen)?);
    threads.handles.push(Builder::new().name(name).spawn(move || {
        runtime.block_on(pass_on(server, socket, asked));
        drop(ended);
    })?);
    // It is dropped, never sent.
    let _ = end.await;
    Ok(())
}

/// Waits for the upstreams' answers and gives them to who asked, until nobody asks any more.
async fn pass_on(server: Arc<Server>, socket: Arc<UdpSocket>, mut asked: mpsc::UnboundedReceiver<Asked>) {
    let mut forwarding = JoinSet::new();
    while let Some(Asked { query, asker, asking, _place: place }) = asked.recv().await {
        while forwarding.try_join_next().is_some() {}
        let (server, socket) = (Arc::clone(&server), Arc::clone(&socket));
        forwarding.spawn(async move {
            if let Some(reply) = server.forward(&query, asker, asking).await {
                Outbox::of(reply, asker.peer).send_now(&socket);
            }
            drop(place);
        });
    }
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
            if let Some(reply) = answer(server, packet, peer, begun, ask) {
                outbox.put(reply, peer);
            }
        }
        outbox.send(socket);
    }
}

/// The reply, if there is one now; none if nothing is owed, or once the upstreams have answered.
fn answer(
    server: &Server,
    packet: &[u8],
    peer: SocketAddr,
    begun: Instant,
    ask: &mpsc::UnboundedSender<Asked>,
) -> Option<Vec<u8>> {
    let asker = Asker { peer, transport: Transport::Udp, begun };
    let query = match server.decide(asker, packet) {
        Decision::Drop => return None,
        Decision::Reply(reply) => return Some(reply),
        Decision::Forward(query) => query,
    };
    if let Some(reply) = server.kept(&query, asker) {
        return Some(reply);
    }
    let Some(_place) = server.place(asker) else { return server.failed(&query, asker) };
    let asking = server.begin(&query, asker);
    // Nobody takes it any more when the server ends.
    let _ = ask.send(Asked { query, asker, asking, _place });
    None
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
