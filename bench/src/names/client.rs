//! Those who ask.

use std::{
    fmt::Write,
    net::{SocketAddr, UdpSocket},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use portolan_bench::stats::Series;

use crate::servers::{ASKERS, asker};

const PATIENCE: Duration = Duration::from_secs(10);
/// Queries that each of dnsperf's processes has under way.
const UNDER_WAY: &str = "16";

/// Queries a second that dnsperf gets answered, asking for A records of these names from all pods at once, one process each.
pub fn rate(server: SocketAddr, names: &[String], time: Duration) -> Result<f64> {
    let mut file = tempfile::NamedTempFile::new()?;
    let mut queries = String::new();
    for name in names {
        writeln!(queries, "{name} A")?;
    }
    std::io::Write::write_all(&mut file, queries.as_bytes())?;
    let start = |number| {
        let mut command = Command::new("dnsperf");
        command.args(["-s", &server.ip().to_string(), "-p", &server.port().to_string(), "-q", UNDER_WAY]);
        command.args(["-a", &asker(number).to_string(), "-l", &time.as_secs().max(1).to_string(), "-d"]);
        command.arg(file.path()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("dnsperf")
    };
    let running = (0..ASKERS).map(start).collect::<Result<Vec<_>>>()?;
    let mut sum = 0.0;
    for process in running {
        let output = process.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let number = |what| said.lines().find_map(|line| line.trim().strip_prefix(what)?.split_whitespace().next());
        let codes = number("Response codes:");
        ensure!(codes == Some("NOERROR"), "{server} answers {codes:?}: {said}");
        sum += number("Queries per second:")
            .and_then(|text| text.parse::<f64>().ok())
            .with_context(|| said.to_string())?;
    }
    Ok(sum)
}

/// Asks for one name after the other, each from the next pod.
pub struct Ask {
    sockets: Vec<UdpSocket>,
    count: u16,
}

impl Ask {
    pub fn new(server: SocketAddr) -> Result<Self> {
        let open = |number| {
            let socket = UdpSocket::bind((asker(number), 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(server)?;
            Ok(socket)
        };
        Ok(Self { sockets: (0..ASKERS).map(open).collect::<Result<_>>()?, count: 0 })
    }

    /// How long each answer took, in µs.
    pub fn each(&mut self, names: impl Iterator<Item = String>) -> Result<Series> {
        Ok(Series::new(names.map(|name| self.one(&name)).collect::<Result<Vec<_>>>()?))
    }

    fn one(&mut self, name: &str) -> Result<f64> {
        self.count = self.count.wrapping_add(1);
        let socket = &self.sockets[usize::from(self.count) % self.sockets.len()];
        let query = query(self.count, name)?;
        let mut answer = [0; 512];
        let begun = Instant::now();
        socket.send(&query)?;
        let length = socket.recv(&mut answer)?;
        let took = begun.elapsed();
        // The same id, a response without error, and one answer at least (RFC 1035, section 4.1.1).
        let answered = length > query.len() && answer[..2] == query[..2] && answer[3] & 15 == 0 && answer[7] > 0;
        ensure!(answered, "{name} is not answered: {:?}", &answer[..length]);
        Ok(took.as_secs_f64() * 1e6)
    }
}

/// A query for an A record (RFC 1035, section 4).
fn query(id: u16, name: &str) -> Result<Vec<u8>> {
    let mut query = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    Ok(query)
}

/// Waits until a server knows a name.
pub fn wait_for(server: SocketAddr, name: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match Ask::new(server)?.one(name) {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > end => bail!("{server} does not answer for {name}: {e:#}"),
            Err(_) => thread::sleep(PATIENCE / 100),
        }
    }
}
