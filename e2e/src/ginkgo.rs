//! What a Ginkgo suite says of its specs: its JSON report (`--ginkgo.json-report`, type `Report` of package
//! github.com/onsi/ginkgo/v2/types), which csi-sanity and Kubernetes' suites both write.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The message of a spec that the suite's own authors have switched off.
pub const PENDING: &str = "pending";

/// How a spec ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and all of it was so.
    Passed,
    /// It ran and failed, or ended in another way than it should.
    Failed,
    /// The suite found that it doesn't apply, and says why.
    Skipped,
    /// It was not asked for.
    LeftOut,
}

/// One spec of a report.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The texts of the containers it is in, outermost first.
    pub containers: Vec<String>,
    /// Containers and the spec's own text, as a filter sees them.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed or was skipped; empty otherwise.
    pub message: String,
    /// How long it ran.
    pub seconds: f64,
}

/// All specs of a run, in the order of the report.
#[derive(Debug, Default)]
pub struct Report {
    /// The specs, and what of the suite's own set-up failed.
    pub specs: Vec<Spec>,
}

impl Report {
    /// Reads a report's JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(json: &str) -> Result<Self> {
        let suites: Value = serde_json::from_str(json).context("a Ginkgo report")?;
        let suites = suites.as_array().context("a Ginkgo report is a list of suites")?;
        let specs = suites.iter().filter_map(|suite| suite["SpecReports"].as_array()).flatten();
        Ok(Self { specs: specs.filter_map(spec).collect() })
    }

    /// The specs that ended like this.
    pub fn of(&self, outcome: Outcome) -> impl Iterator<Item = &Spec> {
        self.specs.iter().filter(move |spec| spec.outcome == outcome)
    }

    /// One line: how many passed, failed and were skipped.
    pub fn totals(&self) -> String {
        let count = |outcome| self.of(outcome).count();
        format!(
            "{} passed, {} failed, {} skipped",
            count(Outcome::Passed),
            count(Outcome::Failed),
            count(Outcome::Skipped)
        )
    }

    /// The suite's reasons for skipping, each with the number of specs.
    pub fn reasons(&self) -> BTreeMap<&str, usize> {
        let mut reasons = BTreeMap::new();
        for spec in self.of(Outcome::Skipped) {
            *reasons.entry(spec.message.as_str()).or_default() += 1;
        }
        reasons
    }

    /// Each failed spec with its message, shortened.
    pub fn failures(&self) -> String {
        let mut text = String::new();
        for spec in self.of(Outcome::Failed) {
            let _ = writeln!(text, "FAILED {} ({:.0} s)", spec.name, spec.seconds);
            for line in spec.message.lines().take(20) {
                let _ = writeln!(text, "    {line}");
            }
        }
        text
    }

    /// Fails when a spec failed, when none passed, or when one was skipped for a reason that is not in `expected` (a part of the
    /// suite's message, and why it doesn't apply): a capability that gets lost must not pass for a suite that does.
    ///
    /// # Errors
    /// With each such spec.
    pub fn check(&self, expected: &[(&str, &str)]) -> Result<()> {
        let failures = self.failures();
        ensure!(failures.is_empty(), "{}\n{failures}", self.totals());
        ensure!(self.of(Outcome::Passed).next().is_some(), "no spec passed: {}", self.totals());
        let known = |spec: &Spec| expected.iter().any(|(part, _)| spec.message.contains(part));
        let unexpected: Vec<String> = self
            .of(Outcome::Skipped)
            .filter(|spec| !known(spec))
            .map(|spec| format!("{}: {}", spec.name, spec.message))
            .collect();
        ensure!(unexpected.is_empty(), "skipped, and we don't know why it should be:\n{}", unexpected.join("\n"));
        Ok(())
    }
}

fn spec(report: &Value) -> Option<Spec> {
    let string = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let containers: Vec<String> =
        report["ContainerHierarchyTexts"].as_array().into_iter().flatten().map(string).collect();
    let mut message = string(&report["Failure"]["Message"]);
    if report["State"] == "pending" {
        message = PENDING.into();
    }
    let outcome = match report["State"].as_str()? {
        "passed" => Outcome::Passed,
        "skipped" if message.is_empty() => Outcome::LeftOut,
        "skipped" | "pending" => Outcome::Skipped,
        _ => Outcome::Failed,
    };
    let own = string(&report["LeafNodeText"]);
    let own = if report["LeafNodeType"] == "It" {
        own
    } else if outcome == Outcome::Failed {
        // The suite's set-up or clean-up has no text of its own.
        format!("[{}] {own}", string(&report["LeafNodeType"]))
    } else {
        return None;
    };
    let name = containers.iter().chain([&own]).filter(|text| !text.is_empty()).cloned().collect::<Vec<_>>().join(" ");
    // In nanoseconds.
    let seconds = report["RunTime"].as_f64().unwrap_or_default() / 1e9;
    Some(Spec { containers, name, outcome, message, seconds })
}

/// A regular expression (Go's) of exactly this text.
pub fn literal(text: &str) -> String {
    text.chars().fold(String::new(), |mut pattern, character| {
        if !character.is_alphanumeric() && !" -:".contains(character) {
            pattern.push('\\');
        }
        pattern.push(character);
        pattern
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"SpecReports": [
        {"LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed", "ContainerHierarchyTexts": null},
        {"LeafNodeType": "It", "LeafNodeText": "works", "State": "passed", "ContainerHierarchyTexts": ["Node", "stage"], "RunTime": 1500000000},
        {"LeafNodeType": "It", "LeafNodeText": "grows", "State": "skipped", "ContainerHierarchyTexts": ["Node"],
         "Failure": {"Message": "NodeExpandVolume not supported"}},
        {"LeafNodeType": "It", "LeafNodeText": "waits", "State": "pending", "ContainerHierarchyTexts": ["Node"]},
        {"LeafNodeType": "It", "LeafNodeText": "flies", "State": "skipped", "ContainerHierarchyTexts": ["Node"]}
    ]}]"#;

    fn with(state: &str, kind: &str) -> Report {
        Report::parse(
            &REPORT.replace("\"passed\", \"ContainerHierarchyTexts\": null", state).replace("BeforeSuite", kind),
        )
        .unwrap()
    }

    #[test]
    fn names_are_taken_literally() {
        assert_eq!(literal("[Testpattern: PV (fs)]"), r"\[Testpattern: PV \(fs\)\]");
    }

    #[test]
    fn a_report_is_read() {
        let report = Report::parse(REPORT).unwrap();
        assert_eq!(report.totals(), "1 passed, 0 failed, 2 skipped");
        assert_eq!((report.specs[0].name.as_str(), report.specs[0].seconds), ("Node stage works", 1.5));
        assert_eq!(report.specs[3].outcome, Outcome::LeftOut);
        assert_eq!(report.reasons(), BTreeMap::from([("NodeExpandVolume not supported", 1), (PENDING, 1)]));
    }

    #[test]
    fn a_skip_needs_a_reason_of_ours() {
        let report = Report::parse(REPORT).unwrap();
        report.check(&[("NodeExpandVolume", "it needs none"), (PENDING, "it is switched off")]).unwrap();
        let error = report.check(&[("ListVolumes", "no"), (PENDING, "")]).unwrap_err().to_string();
        assert!(error.contains("Node grows: NodeExpandVolume not supported"), "{error}");
    }

    #[test]
    fn whatever_ended_badly_is_a_failure() {
        for state in ["failed", "panicked", "timedout", "interrupted", "aborted"] {
            for kind in ["It", "BeforeSuite"] {
                let report = with(&format!(r#""{state}", "Failure": {{"Message": "because"}}"#), kind);
                let error = report.check(&[("NodeExpandVolume", ""), (PENDING, "")]).unwrap_err().to_string();
                assert!(error.contains("because") && error.contains("1 failed"), "{state}: {error}");
            }
        }
    }

    #[test]
    fn a_run_of_nothing_is_no_success() {
        assert!(Report::parse("[]").unwrap().check(&[]).is_err());
        assert!(Report::parse("{}").is_err());
    }
}
