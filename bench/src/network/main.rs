//! `make bench-network`: what Portolan's networks take beside networks made by hand, in the same run, turn by turn. Needs no cluster.
//! Asserts nothing about speed; docs/benchmarks.md says what is measured and how.

mod encrypted;
mod load;
mod nodes;
mod ways;

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use portolan_bench::{
    end,
    stats::{Pairs, Table},
};

use crate::{load::Server, nodes::Node, ways::Way};

/// How much is measured.
struct Sizes {
    /// Turns in which each way is measured once.
    turns: usize,
    /// How long one measurement lasts.
    time: Duration,
}

const FULL: Sizes = Sizes { turns: 8, time: Duration::from_secs(1) };
/// To see whether it works: `QUICK=1`.
const QUICK: Sizes = Sizes { turns: 2, time: Duration::from_millis(200) };
/// For a machine whose only processor is emulated, a tenth as fast: `EMULATED=1`.
const EMULATED: Sizes = Sizes { turns: 8, time: Duration::from_secs(3) };

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = String::new();
    let result = run(&mut report).await;
    end(&report, result)
}

/// What is said instead of the table of encrypted networks.
const NO_WIREGUARD: &str = "\nEncrypted networks: not measured, as this machine's kernel has no WireGuard. `make bench-encrypted` measures them in a \
     guest of lane openzfs, whose kernel has it.\n";

async fn run(report: &mut String) -> Result<()> {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_emulated = is_set("EMULATED");
    let sizes = match (is_set("QUICK"), is_emulated) {
        (true, _) => QUICK,
        (false, true) => EMULATED,
        (false, false) => FULL,
    };
    let nodes = Node::two()?;
    let [across, within] = ways::portolan(&nodes, &ways::OPEN).await?;
    // What a real processor does is measured on one.
    if !is_emulated {
        let [hand_across, hand_within] = ways::by_hand(&nodes)?;
        let (routed, redirected) = (ways::routed(&nodes)?, ways::redirected(&nodes)?);
        let between = [across.clone(), hand_across, ways::raw(&nodes), routed, redirected];
        for (place, ways) in [("of two nodes", &between[..]), ("of one node", &[within, hand_within])] {
            eprintln!("pods {place}");
            *report += &compare(place, ways, &MEASUREMENTS, &sizes)?;
        }
    }
    if !encrypted::is_possible(&nodes[0]) {
        *report += NO_WIREGUARD;
        return Ok(());
    }
    eprintln!("pods of two nodes, encrypted");
    let ways = [encrypted::portolan(&nodes).await?, encrypted::by_hand(&nodes)?, across];
    *report += &compare("of two nodes, encrypted", &ways, &ENCRYPTED, &sizes)?;
    Ok(())
}

/// Measures all of these ways in each turn, another one first each time, and puts the first one beside each of the others.
fn compare(place: &str, ways: &[Way], measurements: &[Measurement], sizes: &Sizes) -> Result<String> {
    let servers = ways.iter().map(|way| Server::start(&way.to)).collect::<Result<Vec<_>>>()?;
    std::thread::sleep(SETTLES);
    let mut text = String::new();
    // One row for each of the others, of each number that is measured.
    let rows_of = |it: &Measurement| it.numbers.iter().map(|(what, _)| others(ways, what)).collect::<Vec<_>>();
    let mut rows: Vec<_> = measurements.iter().map(rows_of).collect();
    for turn in 0..sizes.turns {
        for (measurement, rows) in measurements.iter().zip(&mut rows) {
            let mut found = vec![Vec::new(); ways.len()];
            for number in 0..ways.len() {
                let which = (turn + number) % ways.len();
                found[which] = (measurement.take)(&ways[which], sizes.time)?;
            }
            for (number, rows) in rows.iter_mut().enumerate() {
                for (row, theirs) in rows.iter_mut().zip(&found[1..]) {
                    row.push(found[0][number], theirs[number]);
                }
            }
        }
    }
    drop(servers);
    for (measurement, rows) in measurements.iter().zip(rows) {
        for ((what, unit), rows) in measurement.numbers.iter().zip(rows) {
            text += &format!("\n{}", Table::new(format!("Pods {place}: {what}"), unit, rows).markdown());
        }
    }
    Ok(text)
}

fn others(ways: &[Way], what: &str) -> Vec<Pairs> {
    ways[1..].iter().map(|way| Pairs::new(what, way.name)).collect()
}

/// How long the servers may take to listen.
const SETTLES: Duration = Duration::from_millis(500);

struct Measurement {
    /// What its numbers are, and their units.
    numbers: &'static [(&'static str, &'static str)],
    take: fn(&Way, Duration) -> Result<Vec<f64>>,
}

const REQUESTS: Measurement = Measurement {
    numbers: &[
        ("request and answer, one at a time", "thousands a second, more is better"),
        ("request and answer, p50 of a turn", "µs"),
        ("request and answer, p99 of a turn", "µs"),
    ],
    take: |way, time| {
        let (rate, took) = load::requests(way, time)?;
        Ok(vec![rate, took.quantile(0.5), took.quantile(0.99)])
    },
};

const MEASUREMENTS: [Measurement; 4] = [
    Measurement {
        numbers: &[("TCP, 1 stream", "Gbit/s, more is better")],
        take: |way, time| Ok(vec![load::tcp(way, 1, time)?]),
    },
    Measurement {
        numbers: &[("TCP, 4 streams", "Gbit/s, more is better")],
        take: |way, time| Ok(vec![load::tcp(way, 4, time)?]),
    },
    Measurement {
        numbers: &[("datagrams of 64 bytes", "thousands a second that arrive, more is better")],
        take: |way, time| Ok(vec![load::small(way, time)?]),
    },
    REQUESTS,
];

/// What is measured of encrypted ways, also where the only processor is emulated.
const ENCRYPTED: [Measurement; 3] = [
    Measurement {
        numbers: &[("TCP, 1 stream", "Mbit/s, more is better")],
        take: |way, time| Ok(vec![load::tcp(way, 1, time)? * 1000.0]),
    },
    Measurement {
        numbers: &[("datagrams of 64 bytes, 32 at a time", "thousands a second that arrive, more is better")],
        take: |way, time| Ok(vec![load::bursts(way, time)?]),
    },
    REQUESTS,
];
