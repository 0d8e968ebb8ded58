//! `kubectl portable move`: makes a VolumeMigration and shows how far it is.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use portolan_crds::{
    MigratingVolume, MigratingVolumePhase, MigrationMode, MigrationPhase, VolumeMigration, VolumeMigrationSpec,
    VolumeMigrationStatus,
};

use crate::bytes::{Human, Time};
use crate::print;

/// How often is looked.
const EVERY: Duration = Duration::from_millis(500);
/// Nobody has taken it up after so many looks.
const UNTOUCHED: u32 = 20;

/// What to move, and how.
#[derive(Args)]
pub struct Options {
    /// `pvc/NAME` for a claim's volume (a pod that uses it moves along), or `pod/NAME` for a pod with all its volumes.
    what: Subject,
    /// The node to move to.
    #[arg(long)]
    to: String,
    /// The namespace; kubectl's own if not given.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Evict the pod first, instead of when most of the data are there.
    #[arg(long)]
    cold: bool,
    /// Give up after so many seconds; a day if not given.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(1..))]
    timeout: Option<i64>,
    /// Bytes a second that each volume may send at most (50M).
    #[arg(long)]
    bandwidth: Option<String>,
    /// The longest final transfer that is aimed at, in milliseconds.
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(i64).range(1..))]
    target_downtime: Option<i64>,
    /// Show how far it is until it ends; `--wait=false` only asks for it.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    wait: bool,
}

/// A claim or a pod, by its name.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Subject {
    Claim(String),
    Pod(String),
}

impl std::str::FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some(("pvc" | "persistentvolumeclaim" | "persistentvolumeclaims", name)) if !name.is_empty() => {
                Ok(Self::Claim(name.to_owned()))
            }
            Some(("pod" | "pods" | "po", name)) if !name.is_empty() => Ok(Self::Pod(name.to_owned())),
            _ => Err("allowed are pvc/NAME and pod/NAME".to_owned()),
        }
    }
}

impl Options {
    fn migration(&self) -> VolumeMigration {
        let (claim, pod, prefix) = match &self.what {
            Subject::Claim(name) => (Some(name.clone()), None, name),
            Subject::Pod(name) => (None, Some(name.clone()), name),
        };
        let spec = VolumeMigrationSpec {
            claim,
            pod,
            node: self.to.clone(),
            mode: if self.cold { MigrationMode::Cold } else { MigrationMode::Warm },
            target_downtime_milliseconds: self.target_downtime,
            bandwidth: self.bandwidth.clone(),
            timeout_seconds: self.timeout.unwrap_or(24 * 3600),
        };
        // The API server shortens it to what a name may be, and adds what makes it a new one.
        let metadata = ObjectMeta { generate_name: Some(format!("{prefix}-")), ..ObjectMeta::default() };
        VolumeMigration { metadata, spec, status: None }
    }
}

/// Asks for the move, and follows it.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("can't find out which cluster to talk to: is KUBECONFIG set?")?;
    let namespace = options.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let api: Api<VolumeMigration> = Api::namespaced(client, &namespace);
    let made = match api.create(&PostParams::default(), &options.migration()).await {
        Err(kube::Error::Api(status)) => bail!("{}", status.message),
        made => made.context("can't make a VolumeMigration")?,
    };
    let name = made.name_any();
    print(&format!("volumemigration/{name} (ends early with: kubectl -n {namespace} delete vmig {name})"))?;
    if !options.wait {
        return Ok(());
    }
    let (mut said, mut looks) = (Vec::new(), 0);
    loop {
        let found = api.get_opt(&name).await.with_context(|| format!("can't read VolumeMigration {name}"))?;
        let status =
            found.and_then(|found| if found.metadata.deletion_timestamp.is_some() { None } else { Some(found) });
        let Some(migration) = status else { bail!("volumemigration/{name} was deleted: the move was cancelled") };
        let phase = migration.phase();
        let status = migration.status.unwrap_or_default();
        let lines = lines(&status);
        for line in lines.iter().filter(|line| !said.contains(*line)) {
            print(line)?;
        }
        said = lines;
        match phase {
            MigrationPhase::Done => return Ok(()),
            MigrationPhase::Failed | MigrationPhase::Cancelled => bail!("{}", status.message),
            MigrationPhase::Pending if looks == UNTOUCHED => {
                print("nobody has taken it up yet: does portolan-csi-controller run?")?;
            }
            _ => {}
        }
        looks += 1;
        tokio::time::sleep(EVERY).await;
    }
}

/// How far it is: one line for all, and one for each volume that is under way.
fn lines(status: &VolumeMigrationStatus) -> Vec<String> {
    let mut lines = vec![format!("{:?}: {}", status.phase, status.message)];
    match (status.phase, status.downtime_milliseconds) {
        (MigrationPhase::Pending | MigrationPhase::Failed | MigrationPhase::Cancelled, _) => return lines,
        (MigrationPhase::Done, downtime) => {
            let downtime = downtime.map(|downtime| format!(", the pod was away for {}", Time(downtime)));
            lines[0] = format!("Done: {} sent{}", Human(status.bytes), downtime.unwrap_or_default());
            lines.extend(status.volumes.iter().map(ended));
        }
        _ => lines.extend(status.volumes.iter().filter(|it| it.phase != MigratingVolumePhase::Waiting).map(progress)),
    }
    lines
}

fn progress(volume: &MigratingVolume) -> String {
    let mut text = format!("  {}: {:?}, {}", volume.claim, volume.phase, Human(volume.bytes));
    if let Some(all) = volume.estimated_bytes {
        text.push_str(&format!(" (this round about {})", Human(all)));
    }
    if let Some(rate) = volume.rate_bytes_per_second {
        text.push_str(&format!(", {}/s", Human(rate)));
    }
    if let Some(eta) = volume.eta_seconds {
        text.push_str(&format!(", about {} left", Time(eta.saturating_mul(1000))));
    }
    text
}

fn ended(volume: &MigratingVolume) -> String {
    let (claim, bytes, rounds) = (&volume.claim, Human(volume.bytes), volume.rounds);
    let mut text = format!("  {claim}: {bytes} in {rounds} rounds and the final one");
    if let Some(last) = volume.final_bytes {
        text.push_str(&format!(" of {}", Human(last)));
    }
    if let Some(downtime) = volume.downtime_milliseconds {
        text.push_str(&format!(", {} from unmounted to writable", Time(downtime)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_to_move() {
        assert_eq!("pvc/data".parse(), Ok(Subject::Claim("data".to_owned())));
        assert_eq!("pod/db-0".parse(), Ok(Subject::Pod("db-0".to_owned())));
        for wrong in ["data", "pvc/", "deploy/web"] {
            assert!(wrong.parse::<Subject>().unwrap_err().contains("pvc/NAME"), "{wrong}");
        }
    }

    #[test]
    fn progress_has_bytes_rate_and_time_left() {
        let status = json!({
            "phase": "PreCopy", "message": "data of db are sent while the pod runs",
            "volumes": [
                {"claim": "db", "volume": "v", "phase": "PreCopy", "bytes": 1048576, "estimatedBytes": 4194304,
                 "rateBytesPerSecond": 1048576, "etaSeconds": 3},
                {"claim": "log", "volume": "w"},
            ],
        });
        assert_eq!(
            lines(&serde_json::from_value(status).unwrap()),
            [
                "PreCopy: data of db are sent while the pod runs",
                "  db: PreCopy, 1Mi (this round about 4Mi), 1Mi/s, about 3.0 s left",
            ]
        );
    }

    #[test]
    fn the_end_has_the_figures() {
        let status = json!({
            "phase": "Done", "bytes": 3072, "downtimeMilliseconds": 2100,
            "volumes": [{"claim": "db", "volume": "v", "phase": "Done", "bytes": 3072, "rounds": 2, "finalBytes": 1024,
                "downtimeMilliseconds": 300}],
        });
        assert_eq!(
            lines(&serde_json::from_value(status).unwrap()),
            [
                "Done: 3Ki sent, the pod was away for 2.1 s",
                "  db: 3Ki in 2 rounds and the final one of 1Ki, 300 ms from unmounted to writable",
            ]
        );
    }
}
