//! `make bench-names`: Portolan's DNS server beside CoreDNS with the same names, in the same run, turn by turn. Needs no cluster.
//! Asserts nothing about speed; docs/benchmarks.md says what is measured and how.

mod client;
mod servers;

use std::{
    net::SocketAddr,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use portolan_bench::{
    end,
    stats::{Pairs, Table},
};
use portolan_dns::Zone;

use crate::{
    client::{Ask, rate, wait_for},
    servers::{COREDNS, CoreDns, ECHO, OURS, Ours, RELAY, start_echo, start_relay, zone},
};

/// Set in the namespace that all of it runs in.
const INSIDE: &str = "PORTOLAN_BENCH_INSIDE";
/// Names in both servers.
const NAMES: usize = 1000;
/// Names that only the upstream knows.
const FOREIGN: usize = 100_000;
/// Those of them that are asked again and again.
const KNOWN: usize = 100;
/// Records of a large zone.
const LARGE: usize = 150_000;

/// How much is measured.
struct Sizes {
    turns: usize,
    /// How long queries are sent as fast as they can be.
    time: Duration,
    /// Queries of a turn, one at a time.
    queries: usize,
}

const FULL: Sizes = Sizes { turns: 8, time: Duration::from_secs(3), queries: 10_000 };
/// To see whether it works: `QUICK=1`.
const QUICK: Sizes = Sizes { turns: 2, time: Duration::from_secs(1), queries: 1000 };

fn main() -> ExitCode {
    let mut report = String::new();
    let result = if std::env::var_os(INSIDE).is_some() { run(&mut report) } else { Err(inside()) };
    end(&report, result)
}

/// Begins again in a network namespace of its own, whose loopback is up. Returns only why it could not.
fn inside() -> anyhow::Error {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(e) => return e.into(),
    };
    let mut again = Command::new("unshare");
    again.args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\""]).arg(program).env(INSIDE, "1");
    anyhow!(again.exec()).context("unshare")
}

fn run(report: &mut String) -> Result<()> {
    let sizes = if std::env::var_os("QUICK").is_some_and(|quick| !quick.is_empty()) { QUICK } else { FULL };
    let coredns = CoreDns::start(NAMES, FOREIGN)?;
    let ours = Ours::start(NAMES)?;
    start_echo()?;
    start_relay()?;
    for server in [OURS, COREDNS, ECHO, RELAY] {
        wait_for(server, &own(0))?;
    }
    *report += &throughput(&sizes)?;
    *report += &latency(&sizes)?;
    *report += &large(&ours, &sizes)?;
    *report += &format!("\nCoreDNS, which is not asked for these, has {} MiB then.\n", coredns.memory()? >> 20);
    Ok(())
}

fn own(number: usize) -> String {
    servers::own(number % NAMES)
}

/// Asks each of these servers, another one first in each turn; returns what each gave, in their order.
fn each<T>(turn: usize, servers: &[SocketAddr], mut run: impl FnMut(SocketAddr) -> Result<T>) -> Result<Vec<T>> {
    let first = turn % servers.len();
    let mut given = Vec::new();
    for number in 0..servers.len() {
        given.push(run(servers[(first + number) % servers.len()])?);
    }
    given.rotate_right(first);
    Ok(given)
}

/// Names by what it takes to answer them.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Kind {
    Own,
    AskedBefore,
    New,
}

impl Kind {
    fn text(self) -> &'static str {
        match self {
            Self::Own => "own names",
            Self::AskedBefore => "forwarded names, asked before",
            Self::New => "forwarded names, asked for the first time",
        }
    }

    /// What is beside Portolan: CoreDNS, and the limit.
    fn beside(self) -> &'static [(&'static str, SocketAddr)] {
        match self {
            Self::Own => &[("CoreDNS", COREDNS), ("an echo", ECHO)],
            Self::AskedBefore => &[("CoreDNS", COREDNS)],
            Self::New => &[("CoreDNS", COREDNS), ("a relay", RELAY)],
        }
    }

    /// Portolan first.
    fn servers(self) -> Vec<SocketAddr> {
        [OURS].into_iter().chain(self.beside().iter().map(|(_, server)| *server)).collect()
    }

    /// A name from the first number of a turn and that of the query.
    fn name(self, next: usize, number: usize) -> String {
        match self {
            Self::Own => own(number),
            Self::AskedBefore => servers::foreign(number % KNOWN),
            Self::New => servers::foreign(next + number),
        }
    }
}

fn throughput(sizes: &Sizes) -> Result<String> {
    let own: Vec<_> = (0..NAMES).map(own).collect();
    let known: Vec<_> = (0..KNOWN).map(servers::foreign).collect();
    let mut rows = Vec::new();
    for (kind, names) in [(Kind::Own, own), (Kind::AskedBefore, known)] {
        let mut pairs: Vec<_> = kind.beside().iter().map(|(peer, _)| Pairs::new(kind.text(), peer)).collect();
        for turn in 0..sizes.turns {
            let rates = each(turn, &kind.servers(), |server| rate(server, &names, sizes.time))?;
            for (pairs, theirs) in pairs.iter_mut().zip(&rates[1..]) {
                pairs.push(rates[0] / 1000.0, theirs / 1000.0);
            }
        }
        rows.extend(pairs);
    }
    Ok(format!(
        "\n{}",
        Table::new("As fast as they answer", "thousands of queries a second, more is better", rows).markdown()
    ))
}

fn latency(sizes: &Sizes) -> Result<String> {
    // Those that are asked for the first time are asked once of each server.
    let mut next = KNOWN;
    ensure!(KNOWN + sizes.turns * sizes.queries <= FOREIGN, "too few names for so many queries");
    let mut rows = Vec::new();
    for kind in [Kind::Own, Kind::AskedBefore, Kind::New] {
        let row = |text, part| {
            let of = |(peer, _): &(&'static str, _)| Pairs::new(format!("{}, {text} of a turn", kind.text()), peer);
            (part, kind.beside().iter().map(of).collect::<Vec<_>>())
        };
        let mut quantiles = [row("p50", 0.5), row("p99", 0.99)];
        for turn in 0..sizes.turns {
            let names = |number| kind.name(next, number);
            let given = each(turn, &kind.servers(), |server| Ask::new(server)?.each((0..sizes.queries).map(names)))?;
            if kind == Kind::New {
                next += sizes.queries;
            }
            for (part, rows) in &mut quantiles {
                for (pairs, theirs) in rows.iter_mut().zip(&given[1..]) {
                    pairs.push(given[0].quantile(*part), theirs.quantile(*part));
                }
            }
        }
        rows.extend(quantiles.into_iter().flat_map(|(_, rows)| rows));
    }
    Ok(format!("\n{}", Table::new("One query at a time", "µs", rows).markdown()))
}

/// A large zone: how long it takes to be made and put in place, and what it takes of memory.
fn large(ours: &Ours, sizes: &Sizes) -> Result<String> {
    let mut text = format!(
        "\n### A zone of {LARGE} records, put in place of the one before\n\n| turn | building, ms | swap, µs | resident, MiB |\n|---|---|---|---|\n"
    );
    for turn in 0..=sizes.turns.min(3) {
        let given = vec![zone(LARGE)];
        let begun = Instant::now();
        let made = Zone::new(given);
        let built = begun.elapsed();
        let begun = Instant::now();
        ours.handle.replace(made);
        let swapped = begun.elapsed();
        wait_for(OURS, &servers::own(LARGE - 1))?;
        let resident = servers::resident("self").context("/proc/self/status")? >> 20;
        text += &format!("| {turn} | {:.0} | {} | {resident} |\n", built.as_secs_f64() * 1000.0, swapped.as_micros());
    }
    Ok(text)
}
