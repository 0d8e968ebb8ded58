//! How long a pod that has died, or isn't Ready any more, is still in answers: Portolan's beside those of the cluster's DNS for a headless Service.

use std::{
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use portolan_bench::stats::{Pairs, Table};
use portolan_e2e::{
    asking::{Answer, Asking, Milliseconds, addresses},
    lab::{Lab, text},
};

use crate::{
    Sizes,
    volumes::{NAMESPACE, Watches},
    watch::Event,
};

const NETWORK: &str = "bench-names";
const BESIDE: &str = "cluster DNS, headless Service";
/// Seconds after which something has gone wrong.
const PATIENCE: u64 = 60;
/// How long both have had a pod before its end, which is longer than the cluster's DNS keeps an answer without it.
const KNOWN: Duration = Duration::from_secs(7);
/// How long is looked for it after.
const WINDOW: Duration = Duration::from_secs(8);
/// Seconds between two questions of one asking pod: what is measured is that much too small at most.
const PAUSE: &str = "0.01";
/// How much later than asked a pod ends, in milliseconds.
const LATER: Milliseconds = 300;

/// The end of a pod for those that ask.
struct End {
    at: Milliseconds,
    /// On the network, and the cluster's.
    addresses: [String; 2],
}

/// Lets pods become unready and die, one after the other; the table of the times until the last answer with each.
///
/// # Errors
/// When a pod does not start, or is never answered.
pub fn measure(lab: &Lab, watches: &Watches, sizes: &Sizes) -> Result<Table> {
    lab.apply(&include_str!("../../manifests/forgetting.yaml").replace("@NAMESPACE@", NAMESPACE))?;
    for pod in ["asks-portolan", "asks-cluster"] {
        ready(watches, pod)?;
    }
    let (ours, theirs) = (format!("mortal.{NAMESPACE}.{NETWORK}."), format!("mortal.{NAMESPACE}.svc.cluster.local."));
    let asking = [
        Asking::begin(lab, NAMESPACE, "asks-portolan", &ours, 1, PAUSE)?,
        Asking::begin(lab, NAMESPACE, "asks-cluster", &theirs, 1, PAUSE)?,
    ];
    let (mut not_ready, mut dead) = (Vec::new(), Vec::new());
    for i in 0..sizes.ends {
        not_ready.push(end(lab, watches, &format!("unready-{i}"), |pod| {
            touch(lab, pod, "unready")?;
            since_1970(unready(watches, pod)?)
        })?);
        // The process looks every 10 ms.
        dead.push(end(lab, watches, &format!("dead-{i}"), |pod| touch(lab, pod, "die"))?);
    }
    let [ours, theirs] = asking.map(Asking::end);
    let answers = [ours?, theirs?];
    lab.kubectl(&["-n", NAMESPACE, "delete", "pods", "asks-portolan", "asks-cluster", "--timeout=1m"])?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "service", "mortal"])?;
    lab.kubectl(&["delete", "containernetwork", NETWORK, "--timeout=1m"])?;
    let row = |what: &str, ends: &[End]| -> Result<Pairs> {
        let mut row = Pairs::new(format!("{what} → the last answer with the pod"), BESIDE);
        for end in ends {
            let [ours, theirs] = [0, 1].map(|i| stale(&answers[i], end.at, &end.addresses[i]));
            row.push(ours?, theirs?);
        }
        Ok(row)
    };
    let rows = [row("not Ready, as the API says", &not_ready)?, row("its process has ended", &dead)?];
    Ok(Table::new("Pods that have gone from names", "ms", rows))
}

/// Starts a pod and ends it as asked, which says when that was.
fn end(lab: &Lab, watches: &Watches, pod: &str, how: impl FnOnce(&str) -> Result<Milliseconds>) -> Result<End> {
    lab.apply(&include_str!("../../manifests/mortal.yaml").replace("@NAMESPACE@", NAMESPACE).replace("@POD@", pod))?;
    ready(watches, pod)?;
    sleep(KNOWN);
    let on_network = addresses(lab, NETWORK, |endpoint| endpoint["pod"] == pod)?.remove(pod).context("no address")?;
    let object = lab.json(&["-n", NAMESPACE, "get", "pod", pod])?;
    let addresses = [on_network, text(&object, "/status/podIP")?.to_owned()];
    let at = how(pod)?;
    sleep(WINDOW);
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", pod, "--timeout=1m"])?;
    Ok(End { at, addresses })
}

/// Tells a pod's process something a moment later, when nobody waits for an answer from a pod that has died; when that was.
fn touch(lab: &Lab, pod: &str, file: &str) -> Result<Milliseconds> {
    let command = format!("(sleep 0.{LATER}; touch /tmp/{file}) > /dev/null 2>&1 & date +%s%3N");
    let asked: Milliseconds =
        lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", &command])?.trim().parse()?;
    Ok(asked + LATER)
}

/// When a pod was Ready.
fn ready(watches: &Watches, pod: &str) -> Result<Instant> {
    watches.pods.first(&format!("{pod} is Ready"), PATIENCE, |event| event.of(pod) && event.is_ready())
}

/// When it wasn't any more.
fn unready(watches: &Watches, pod: &str) -> Result<Instant> {
    let since = ready(watches, pod)?;
    let is = |event: &Event| event.at > since && event.of(pod) && !event.is_ready();
    watches.pods.first(&format!("{pod} is not Ready any more"), PATIENCE, is)
}

fn since_1970(at: Instant) -> Result<Milliseconds> {
    let then = SystemTime::now().checked_sub(at.elapsed()).context("before 1970")?;
    Ok(then.duration_since(UNIX_EPOCH)?.as_millis().try_into()?)
}

/// How long after its end a pod was in answers, in milliseconds; 0 if it wasn't.
fn stale(answers: &[Answer], end: Milliseconds, address: &str) -> Result<f64> {
    let with = |answer: &&Answer| answer.addresses.iter().any(|it| it == address);
    let until = end + u64::try_from(WINDOW.as_millis())?;
    let last = answers.iter().rev().filter(|answer| answer.at <= until).find(with);
    let last = last.with_context(|| format!("{address} was in no answer"))?;
    Ok(last.at.saturating_sub(end) as f64)
}
