//! Kubernetes' own suite for networks (test/e2e/network and test/e2e/common/network in its repository): what of it is about pods' network.

use anyhow::{Context, Result, ensure};

use crate::{
    ginkgo::{Outcome, Report, literal},
    lab::Lab,
};

/// Processes that run specs side by side.
const PROCESSES: usize = 4;

/// What is run: parts of specs' names.
const SELECTION: &[&str] = &[
    "Networking Granular Checks: Pods",
    "Networking should provide unchanging, static URL paths",
    "Services should serve a basic endpoint from pods",
    "Services should serve multiport endpoints from pods",
    "Services should be able to change the type from ExternalName to NodePort",
    "Services should have session affinity work for NodePort service",
    "Services should be able to create a functioning NodePort service",
    "DNS should provide DNS for services",
    "DNS should provide DNS for the cluster",
    "DNS should provide DNS for pods for Hostname",
    "HostPort validates that there is no conflict between pods with same hostPort but different hostIP and protocol",
];

/// Specs that are not asked for: a part of their names, and why not.
const LEFT_OUT: &[(&str, &str)] = &[
    ("[Feature:SCTP", "the machine's kernel need not have SCTP"),
    ("[Feature:Windows]", "the nodes run Linux"),
    ("[Feature:IPv6DualStack]", "the lab's cluster is of IPv4"),
    ("[Provider:GCE]", "the lab is no cloud"),
    ("[Disruptive]", "they restart what the lab's nodes have no units of"),
];

/// Runs the selection and prints its result. Portolan must be installed as the only plugin.
///
/// # Errors
/// When a spec fails, or a part of the selection has none that passed.
pub fn play(lab: &Lab) -> Result<()> {
    lab.step("Kubernetes' suite for networks");
    lab.import("network")?;
    let work = std::env::temp_dir().join(format!("portolan-network-suite-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let log = work.join("log");
    lab.show(format!("{PROCESSES} processes; the log is {}", log.display()));
    let ginkgo = lab.binaries("e2e")?.join("ginkgo").to_string_lossy().into_owned();
    let suite = lab.binaries("network")?.join("e2e-network.test").to_string_lossy().into_owned();
    let mut command = vec![ginkgo, format!("--procs={PROCESSES}"), "--timeout=1h".into(), "--no-color".into()];
    command.extend(SELECTION.iter().map(|name| format!("--focus={}", literal(name))));
    command.extend(LEFT_OUT.iter().map(|(name, _)| format!("--skip={}", literal(name))));
    command.extend([format!("--output-dir={}", work.display()), "--json-report=report.json".into()]);
    command.extend([suite, "--".into(), "-provider=local".into()]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    // Its exit status says no more than the report.
    lab.run_logged(&command, &log)?;
    let report = std::fs::read_to_string(work.join("report.json"));
    let report = report.with_context(|| format!("the suite wrote no report; its log is {}", log.display()))?;
    let report = Report::parse(&report)?;
    for spec in report.specs.iter().filter(|spec| spec.outcome != Outcome::LeftOut) {
        lab.show(format!("{:?} {:4.0} s  {}", spec.outcome, spec.seconds, spec.name));
    }
    lab.show(report.totals());
    report.check(&[])?;
    for part in SELECTION {
        let ran = report.of(Outcome::Passed).any(|spec| spec.name.contains(part));
        ensure!(ran, "no spec whose name has '{part}' passed");
    }
    std::fs::remove_dir_all(&work)?;
    Ok(())
}
