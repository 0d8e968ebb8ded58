//! A pod that asks for one name all the time, and what it was answered when.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::lab::{Lab, text};

/// Milliseconds since 1970. The nodes of the native lane have the machine's clock.
pub type Milliseconds = u64;

/// One answer.
pub struct Answer {
    /// When it was there.
    pub at: Milliseconds,
    /// getent's status.
    pub status: String,
    /// IPv4 addresses.
    pub addresses: Vec<String>,
}

/// A pod that asks.
pub struct Asking<'a> {
    lab: &'a Lab,
    namespace: &'a str,
    pod: &'a str,
}

impl<'a> Asking<'a> {
    /// Begins to ask, so many times at once, with a pause of so many seconds after each answer.
    ///
    /// # Errors
    /// When the pod doesn't run.
    pub fn begin(
        lab: &'a Lab,
        namespace: &'a str,
        pod: &'a str,
        name: &str,
        at_once: u32,
        pause: &str,
    ) -> Result<Self> {
        let asking = Self { lab, namespace, pod };
        let script = include_str!("../manifests/asking.sh");
        asking.shell(&format!("cat > /tmp/asking.sh <<'END'\n{script}\nEND"))?;
        asking.shell(&format!("bash /tmp/asking.sh {name} {at_once} {pause} > /tmp/answers 2>&1 &"))?;
        Ok(asking)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When the pod doesn't run any more, or has printed anything else.
    pub fn end(self) -> Result<Vec<Answer>> {
        self.shell("touch /tmp/stop; sleep 1")?;
        parse(&self.shell("cat /tmp/answers")?)
    }

    fn shell(&self, command: &str) -> Result<String> {
        self.lab.kubectl(&["-n", self.namespace, "exec", self.pod, "--", "sh", "-c", command])
    }
}

fn parse(printed: &str) -> Result<Vec<Answer>> {
    let parse = |line: &str| -> Option<Answer> {
        let mut words = line.split(' ');
        let (at, status) = (words.next()?.parse().ok()?, words.next()?.to_owned());
        let addresses = words.next()?.split(',').filter(|address| !address.is_empty()).map(str::to_owned).collect();
        Some(Answer { at, status, addresses })
    };
    printed.lines().map(|line| parse(line).with_context(|| format!("the asking pod printed {line:?}"))).collect()
}

/// The addresses of a network's pods that are `of` something, by pod.
///
/// # Errors
/// When the slices can't be read.
pub fn addresses(
    lab: &Lab,
    network: &str,
    of: impl Fn(&serde_json::Value) -> bool,
) -> Result<BTreeMap<String, String>> {
    let slices = lab.json(&["get", "networknodeslices"])?;
    let slices = slices["items"].as_array().context("items")?;
    let here = slices.iter().filter(|slice| slice["spec"]["network"] == network);
    let endpoints = here.filter_map(|slice| slice["spec"]["endpoints"].as_array()).flatten();
    let those = endpoints.filter(|endpoint| of(endpoint));
    those.map(|endpoint| Ok((text(endpoint, "/pod")?.to_owned(), text(endpoint, "/address")?.to_owned()))).collect()
}
