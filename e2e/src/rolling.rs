//! A Deployment is restarted while somebody asks for its name all the time: each question is answered, and no answer has a pod that has
//! begun to end.

use std::{
    collections::BTreeMap,
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    asking::{Answer, Asking, Milliseconds, addresses},
    lab::Lab,
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "rolling";
const NETWORK: &str = "rolling";
/// How long after its deletion a pod may be in answers: docs/dns.md says at most a second, and the machine may be busy.
const BOUND: u64 = 5_000;

/// Plays it. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    lab.step("a Deployment is restarted while a pod asks for its name, hundreds of times a second");
    lab.apply(include_str!("../manifests/rolling.yaml"))?;
    lab.kubectl(&["-n", NAMESPACE, "rollout", "status", "deployment/web", "--timeout=2m"])?;
    lab.wait("the asking pod is Ready", 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", "asking"])?))?;
    lab.wait("the name has three addresses", 30, || {
        let count = "getent ahostsv4 web.rolling. | awk '{print $1}' | sort -u | wc -l";
        let found = lab.kubectl(&["-n", NAMESPACE, "exec", "asking", "--", "sh", "-c", count])?;
        ensure!(found.trim() == "3", "{found}");
        Ok(())
    })?;
    let asking = Asking::begin(lab, NAMESPACE, "asking", "web.rolling.", 4, "0")?;
    let ended = restart(lab)?;
    sleep(Duration::from_secs(3));
    judge(lab, &asking.end()?, &ended)?;

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", NETWORK, "--timeout=60s"])?;
    nothing_left(lab)
}

/// Restarts the Deployment; the addresses of the pods that have ended, and when each was first seen to be deleted.
fn restart(lab: &Lab) -> Result<BTreeMap<String, Milliseconds>> {
    let addresses = addresses(lab, NETWORK, |endpoint| endpoint["owner"] == "web")?;
    ensure!(addresses.len() == 3, "{addresses:?}");
    lab.kubectl(&["-n", NAMESPACE, "rollout", "restart", "deployment/web"])?;
    let mut ended = BTreeMap::new();
    lab.wait("all three pods are replaced", 120, || {
        let pods = lab.json(&["-n", NAMESPACE, "get", "pods", "-l", "app=web"])?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis().try_into()?;
        let pods = pods["items"].as_array().context("items")?;
        for (pod, address) in &addresses {
            let there = pods.iter().find(|found| found["metadata"]["name"] == pod.as_str());
            if there.is_none_or(|pod| !pod["metadata"]["deletionTimestamp"].is_null()) {
                ended.entry(address.clone()).or_insert(now);
            }
        }
        ensure!(pods.len() == 3 && ended.len() == 3, "{} pods, {} ended", pods.len(), ended.len());
        Ok(())
    })?;
    Ok(ended)
}

fn judge(lab: &Lab, answers: &[Answer], ended: &BTreeMap<String, Milliseconds>) -> Result<()> {
    let (first, last) = answers.first().zip(answers.last()).context("nothing was asked")?;
    let seconds = last.at.saturating_sub(first.at) / 1000;
    let answered = |answer: &&Answer| answer.status == "0" && !answer.addresses.is_empty();
    if let Some(failed) = answers.iter().find(|answer| !answered(answer)) {
        let count = answers.iter().filter(|answer| !answered(answer)).count();
        bail!("{count} of {} questions failed, the first with status {}", answers.len(), failed.status);
    }
    let mut latest = 0;
    for (address, end) in ended {
        let with = answers.iter().rev().find(|answer| answer.addresses.contains(address));
        let with = with.with_context(|| format!("{address} was never answered, before its end neither"))?;
        latest = latest.max(with.at.saturating_sub(*end));
    }
    ensure!(latest <= BOUND, "a pod was in answers {latest} ms after its deletion was seen: {ended:?}");
    let found = format!("{} questions in {seconds} s, all answered", answers.len());
    lab.show(format!("{found}; the last answer with a deleted pod came {latest} ms after its deletion was seen"));
    Ok(())
}
