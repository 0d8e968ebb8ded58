//! What is outside of a node: a server that knows the node's addresses only.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{Node, PATIENCE, Pod};

/// Where the server listens.
pub const WEB: u16 = 80;
const SHORT: Duration = Duration::from_millis(300);

/// What is outside of a node.
pub struct Outside<'a> {
    pub node: &'a Node,
    pub server: [IpAddr; 2],
    /// The node's addresses there.
    pub node_has: [IpAddr; 2],
}

impl<'a> Outside<'a> {
    /// A server that knows the node's addresses only, and a node that forwards.
    pub fn of(node: &'a Node) -> Self {
        node.netns("outside");
        let other = node.file("outside").display().to_string();
        node.enter("host", &["ip", "link", "add", "o0", "type", "veth", "peer", "name", "o0", "netns", &other]);
        for (netns, last) in [("outside", 1), ("host", 2)] {
            node.enter(netns, &["ip", "address", "add", &format!("198.51.100.{last}/24"), "dev", "o0"]);
            node.enter(netns, &["ip", "address", "add", &format!("2001:db8::{last}/64"), "dev", "o0", "nodad"]);
            node.enter(netns, &["ip", "link", "set", "o0", "up"]);
        }
        node.set("host", "ipv4/ip_forward", "1");
        node.set("host", "ipv6/conf/all/forwarding", "1");
        let both = |last: u16| {
            [
                Ipv4Addr::new(198, 51, 100, u8::try_from(last).unwrap()).into(),
                Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).into(),
            ]
        };
        Self { node, server: both(1), node_has: both(2) }
    }

    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        self.node.at("outside").run(work).unwrap()
    }

    /// The kernel may need a moment until an address may be used.
    pub fn listen(&self, server: IpAddr) -> TcpListener {
        let begun = Instant::now();
        loop {
            match self.node.at("outside").run(|| TcpListener::bind((server, WEB))) {
                Ok(listener) => return listener,
                Err(error) if begun.elapsed() > PATIENCE => panic!("{server}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// From where the server sees a pod that connects to it, for each family.
    pub fn sees(&self, pod: &Pod<'_>, patience: Duration) -> [Option<IpAddr>; 2] {
        [0, 1].map(|family| {
            let server = self.server[family];
            let listener = self.listen(server);
            let client = pod.inside(|| Ok(TcpStream::connect_timeout(&(server, WEB).into(), patience).ok()));
            client.map(|_| listener.accept().unwrap().1.ip())
        })
    }

    /// Asked again, as whoever it was looked for before it was there is given up for a moment.
    pub fn is_reached_by(&self, pod: &Pod<'_>) -> bool {
        (0..4).any(|_| self.sees(pod, PATIENCE) == self.node_has.map(Some))
    }

    /// Of what is expected to be; there it is reached at another moment.
    pub fn is_cut_off_from(&self, pod: &Pod<'_>) -> bool {
        self.sees(pod, SHORT) == [None, None]
    }
}
