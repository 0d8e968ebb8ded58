//! Kubernetes' own suite for storage drivers (test/e2e/storage/external in its repository), with our description of the driver
//! (`manifests/storage-driver.yaml`).

use std::{collections::BTreeMap, fmt::Write, path::Path};

use anyhow::{Context, Result, ensure};

use crate::{
    ginkgo::{Outcome, Report, Spec, literal},
    lab::Lab,
    scene::nothing_left,
};

/// Processes that run specs side by side. Specs mostly wait.
const PROCESSES: usize = 4;

/// All specs of the suite have this at the start of their names.
const ALL: &str = "External Storage";

/// What `make test` runs, within 12 minutes: parts of specs' names.
const SELECTION: &[&str] = &[
    "[Testpattern: Dynamic PV (default fs)] provisioning",
    "[Testpattern: Dynamic PV (default fs)] volumes",
    "[Testpattern: Dynamic PV (default fs)] fsgroupchangepolicy",
    "[Testpattern: Dynamic PV (default fs)] capacity",
    "[Testpattern: Dynamic PV (default fs)] read-write-once-pod",
    "[Testpattern: Dynamic PV (default fs)(allowExpansion)] volume-expand",
    "[Testpattern: Dynamic PV (filesystem volmode)] multiVolume",
    "[Testpattern: Dynamic PV (default fs)] volume-modify [",
    "[Testpattern: Dynamic Snapshot (delete policy)] snapshottable",
    "[Testpattern: Pre-provisioned Snapshot (retain policy)] snapshottable",
    "[Testpattern: Generic Ephemeral-volume (default fs) (late-binding)] ephemeral",
];

/// Specs that change claims before any pod uses them, so with a class that binds at once only; they are run by themselves.
const BOUND_AT_ONCE: &str = "volume-modify-stress";

/// Specs that are not asked for: a part of their names, and why not.
const LEFT_OUT: &[(&str, &str)] = &[
    ("[Disruptive]", "they restart kubelets as systemd's units through SSH; the lab's nodes have neither"),
    ("[Feature:Windows]", "the nodes run Linux"),
    ("with any volume data source", "the images of its populator can't be built here"),
];

/// Specs that the suite itself skips: a part of what it says, and why that is right.
const SKIPPED: &[(&str, &str)] = &[
    ("does not support volume type", "the suite can ask a described driver for dynamic and ephemeral volumes only"),
    ("Suite \"volumeLimits\" does not support GenericEphemeralVolume", "as it says"),
    ("VolumeBindingMode immediate is not compatible", "the suite doesn't try it with drivers that have a topology"),
    (
        "with immediate binding may cause pod startup failures",
        "the suite doesn't try it with drivers that have a topology",
    ),
    ("doesn't support ntfs", "nor does Linux write it"),
    ("doesn't support RWX", "one node writes a volume"),
    ("multiple PVs with the same volumeHandle", "one volume is one PersistentVolume's"),
    ("Not enough topologies", "all nodes have pools of one kind, as the volumes go wherever their pods go"),
    ("does not support snapshots - skipping", "the spec's kind of volume has no class of snapshots in the suite"),
    ("is not ephemeral", "the spec is of ephemeral volumes, and this kind is not"),
    (
        "\"GenericEphemeralVolume\" is ephemeral",
        "the spec is of volumes that outlive their pods, and this kind doesn't",
    ),
    ("does not support group snapshots", "a group is of one pool, and the suite lets its volumes fall on several"),
    ("VolumeGroupSnapshottableTestDriver", "a group is of one pool, and the suite lets its volumes fall on several"),
    ("does not support topology", "a volume is not bound to where it was made"),
    ("does not support volume limits", "the suite would fill a node with hundreds of volumes"),
    ("does not support SELinuxMount", "volumes have no SELinux labels of their own"),
    ("does not support snapshot metadata", "ZFS does not tell the blocks that changed"),
    ("performance test", "make bench measures"),
];

/// Those of pools without zvols.
const SKIPPED_WITHOUT_ZVOLS: &[(&str, &str)] = &[
    ("block", "zfs-fuse has no zvols"),
    ("Block", "zfs-fuse has no zvols"),
    ("doesn't support ext", "zfs-fuse has no zvols, so no other file systems on them"),
    ("doesn't support xfs", "zfs-fuse has no zvols, so no other file systems on them"),
];

/// How much of the suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What fits into `make test`.
    Selection,
    /// All of it, which takes about ten minutes on zfs-fuse.
    Everything,
}

/// Runs the suite and prints its result as a table in Markdown. Portolan must be installed.
///
/// # Errors
/// When a spec fails, is skipped without a reason, or leaves something behind.
pub fn play(lab: &Lab, scope: Scope) -> Result<()> {
    lab.step(format!("Kubernetes' external-storage suite: {scope:?}"));
    lab.import("e2e")?;
    lab.apply(include_str!("../manifests/storage-suite.yaml"))?;
    // Kept if anything fails.
    let work = std::env::temp_dir().join(format!("portolan-storage-suite-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let mut report = match scope {
        Scope::Selection => run(lab, &work, "portolan", SELECTION, &[], "30m")?,
        Scope::Everything => run(lab, &work, "portolan", &[ALL], &[BOUND_AT_ONCE], "12h")?,
    };
    if scope == Scope::Everything {
        let others = run(lab, &work, "e2e-immediate", &[BOUND_AT_ONCE], &[], "30m")?;
        report.specs.extend(others.specs);
    }
    let skipped: Vec<(&str, &str)> =
        if lab.has_zvols() { SKIPPED.to_vec() } else { [SKIPPED, SKIPPED_WITHOUT_ZVOLS].concat() };
    println!("{}", table(&report, &skipped));
    report.check(&skipped)?;
    if scope == Scope::Selection {
        each_part_ran(&report)?;
    }
    lab.kubectl(&["delete", "volumeattributesclass/e2e-modified", "storageclass/e2e-immediate"])?;
    std::fs::remove_dir_all(&work)?;
    nothing_left(lab)
}

/// Runs the specs whose names have one of `focus` and none of `skip`, with volumes of a class.
fn run(lab: &Lab, work: &Path, class: &str, focus: &[&str], skip: &[&str], timeout: &str) -> Result<Report> {
    let programs = lab.binaries("e2e")?;
    let (driver, report, log) = (work.join("driver.yaml"), format!("{class}.json"), work.join(format!("{class}.log")));
    std::fs::write(&driver, description(lab.has_zvols(), class))?;
    lab.show(format!("{PROCESSES} processes, class {class}; the log is {}", log.display()));
    let mut command = vec![programs.join("ginkgo").to_string_lossy().into_owned()];
    command.extend([format!("--procs={PROCESSES}"), format!("--timeout={timeout}"), "--no-color".into()]);
    command.extend(focus.iter().map(|name| format!("--focus={}", literal(name))));
    command.extend(LEFT_OUT.iter().map(|(name, _)| name).chain(skip).map(|name| format!("--skip={}", literal(name))));
    command.extend([format!("--output-dir={}", work.display()), format!("--json-report={report}")]);
    command.extend([programs.join("e2e-storage.test").to_string_lossy().into_owned(), "--".into()]);
    command.extend([format!("-storage.testdriver={}", driver.display()), "-provider=local".into()]);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    // Its exit status says no more than the report.
    lab.run_logged(&command, &log)?;
    let report = std::fs::read_to_string(work.join(report));
    Report::parse(&report.with_context(|| format!("the suite wrote no report; its log is {}", log.display()))?)
}

/// The driver's description for the pools of this lane.
fn description(zvols: bool, class: &str) -> String {
    let chosen = format!("FromExistingClassName: {class}}}");
    let description =
        include_str!("../manifests/storage-driver.yaml").replacen("FromExistingClassName: portolan}", &chosen, 1);
    if !zvols {
        return description;
    }
    let types = "SupportedFsType: {\"\": {}";
    description.replace("block: false", "block: true").replace(types, &format!("{types}, ext4: {{}}, xfs: {{}}"))
}

/// A part of the selection without a spec that passed has lost its meaning: the suite may call it something else by now.
fn each_part_ran(report: &Report) -> Result<()> {
    for part in SELECTION {
        let ran = report.of(Outcome::Passed).any(|spec| spec.name.contains(part));
        ensure!(ran, "no spec whose name has '{part}' passed");
    }
    Ok(())
}

/// What a spec is about, as "suite, kind of volume".
fn topic(spec: &Spec) -> (&str, &str) {
    let text = spec.containers.get(1).map_or("set-up", String::as_str);
    let Some((pattern, suite)) = text.strip_prefix("[Testpattern: ").and_then(|text| text.split_once("] ")) else {
        return (text, "");
    };
    // Labels stand before and after it: "[Slow] volumes", "volume-modify [Feature:…]".
    (suite.split_whitespace().find(|word| !word.starts_with('[')).unwrap_or(suite), pattern.trim())
}

/// The result in Markdown: counts by suite and kind of volume, what failed, and why what was skipped was.
fn table(report: &Report, skipped: &[(&str, &str)]) -> String {
    let mut counts: BTreeMap<(&str, &str), [usize; 3]> = BTreeMap::new();
    for spec in &report.specs {
        let column = match spec.outcome {
            Outcome::Passed => 0,
            Outcome::Failed => 1,
            Outcome::Skipped => 2,
            Outcome::LeftOut => continue,
        };
        counts.entry(topic(spec)).or_default()[column] += 1;
    }
    let mut text = String::from("| suite | volumes | passed | failed | skipped |\n|---|---|---|---|---|\n");
    for ((suite, pattern), [passed, failed, skipped]) in counts {
        let _ = writeln!(text, "| {suite} | {pattern} | {passed} | {failed} | {skipped} |");
    }
    let _ = writeln!(text, "\n{}.\n\n| skipped | the suite says | why that is right |\n|---|---|---|", report.totals());
    for (reason, count) in report.reasons() {
        let why = skipped.iter().find(|(part, _)| reason.contains(part)).map_or("**not expected**", |(_, why)| why);
        let _ = writeln!(text, "| {count} | {} | {why} |", reason.lines().next().unwrap_or_default());
    }
    for (name, why) in LEFT_OUT {
        let _ = writeln!(text, "| | left out: `{name}` | {why} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_ran_and_why_not() {
        let spec = |text: &str, outcome, message: &str| Spec {
            containers: vec![ALL.into(), text.into()],
            name: text.into(),
            outcome,
            message: message.into(),
            seconds: 1.0,
        };
        let report = Report {
            specs: vec![
                spec("[Testpattern: Dynamic PV (default fs)] subPath", Outcome::Passed, ""),
                spec(
                    "[Testpattern: Dynamic PV (default fs)] subPath",
                    Outcome::Skipped,
                    "doesn't support RWX -- skipping",
                ),
                spec("[Testpattern: Dynamic PV (xfs)] [Slow] volumes", Outcome::Failed, "no"),
                spec("[Testpattern: Dynamic PV (ntfs)] volumes", Outcome::LeftOut, ""),
            ],
        };
        let text = table(&report, SKIPPED);
        assert!(text.contains("| subPath | Dynamic PV (default fs) | 1 | 0 | 1 |"), "{text}");
        assert!(text.contains("| volumes | Dynamic PV (xfs) | 0 | 1 | 0 |"), "{text}");
        assert!(text.contains("1 passed, 1 failed, 1 skipped"), "{text}");
        assert!(text.contains("| 1 | doesn't support RWX -- skipping | one node writes a volume |"), "{text}");
        assert!(!text.contains("ntfs"), "{text}");
    }

    #[test]
    fn zvols_are_described_where_there_are_any() {
        assert!(description(false, "portolan").contains("block: false"));
        let zvols = description(true, "portolan");
        assert!(zvols.contains("block: true") && zvols.contains("xfs: {}}"));
        let class =
            |class| description(false, class).lines().find(|line| line.starts_with("StorageClass:")).map(str::to_owned);
        assert_eq!(class("fast").as_deref(), Some("StorageClass: {FromExistingClassName: fast}"));
    }
}
