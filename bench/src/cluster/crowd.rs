//! Ten volumes sent from node to node at once, beside one of them alone.

use std::time::Instant;

use anyhow::{Context, Result};
use portolan_bench::stats::Pairs;
use portolan_e2e::lab::Lab;

use crate::{
    Sizes,
    bare::FOLDER,
    transfer::{End, PATIENCE, change, is_at, is_moving, migration, new_volume},
    volumes::{NAMESPACE, Watches, between},
};

const MANY: usize = 10;
/// The rows' unit.
pub const UNIT: &str = "MiB/s, more is better";

/// So many pairs of one volume and of ten that are as large each, whose claims' names begin with `prefix`.
///
/// # Errors
/// When something does not move.
pub fn measure(
    lab: &Lab,
    watches: &Watches,
    prefix: &str,
    from: &mut End<'_>,
    to: &str,
    sizes: &Sizes,
) -> Result<Pairs> {
    // Ten must fit into the lab's pools.
    let each = sizes.transfer / 2;
    from.bare.time(&format!("mkdir -p {FOLDER} && head -c {each} /dev/urandom > {FOLDER}/random"))?;
    let what =
        format!("{MANY} volumes of {} MiB: all of it, from the first's publishing to the last's end", each >> 20);
    let mut row = Pairs::new(what, "one of them alone");
    for i in 0..sizes.pairs {
        let alone = together(lab, watches, from, to, &[format!("{prefix}-alone-{i}")], each)?;
        let names: Vec<String> = (0..MANY).map(|n| format!("{prefix}-{i}-{n}")).collect();
        let ten = together(lab, watches, from, to, &names, each)?;
        row.push(ten, alone);
    }
    Ok(row)
}

/// Makes the claims with so much in each, moves all of them, and takes them away. MiB a second that their transfers brought together.
fn together(lab: &Lab, watches: &Watches, from: &mut End<'_>, to: &str, names: &[String], bytes: u64) -> Result<f64> {
    let mut volumes = Vec::new();
    for name in names {
        let volume = new_volume(lab, watches, name, &from.node, bytes)?;
        let fill = format!("head -c {bytes} {FOLDER}/random > $at/data");
        from.bare.time(&change(&format!("portolan/{volume}"), &fill))?;
        volumes.push(volume);
    }
    lab.apply(&names.iter().map(|name| format!("---\n{}\n", migration(name, to))).collect::<String>())?;
    let mut times: Vec<(Instant, Instant)> = Vec::new();
    for volume in &volumes {
        let is = |phase| move |event: &_| is_moving(event, to, phase);
        let (published, received) = (is("FinalSync"), is("Activating"));
        let begun = watches.volumes.first(volume, PATIENCE, |event| event.of(volume) && published(event))?;
        let ended = watches.volumes.first(volume, PATIENCE, |event| event.of(volume) && received(event))?;
        watches.volumes.first(volume, PATIENCE, |event| event.of(volume) && is_at(event, to))?;
        times.push((begun, ended));
    }
    let objects: Vec<String> = names.iter().map(|name| format!("volumemigration/{name}")).collect();
    let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
    let wait = ["-n", NAMESPACE, "wait", "--for=jsonpath={.status.phase}=Done", "--timeout=2m"];
    lab.kubectl(&[&wait[..], &objects].concat())?;
    lab.kubectl(&[&["-n", NAMESPACE, "delete", "--timeout=1m"][..], &objects].concat())?;
    let claims: Vec<&str> = names.iter().map(String::as_str).collect();
    lab.kubectl(&[&["-n", NAMESPACE, "delete", "pvc", "--timeout=2m"][..], &claims].concat())?;
    let first = times.iter().map(|it| it.0).min().context("something moves")?;
    let last = times.iter().map(|it| it.1).max().context("something moves")?;
    let mebibytes = (bytes >> 20) * names.len() as u64;
    Ok(mebibytes as f64 * 1000.0 / between(first, last))
}
