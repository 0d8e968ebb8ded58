//! `kubectl portable status`.

use std::fmt::Debug;

use anyhow::{Context, bail};
use comfy_table::{Table, presets};
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::{
    AddressCounts, ContainerNetwork, HandoffPhase, PortableVolume, StorageNode, VolumeMigration, VolumePhase, condition,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::bytes::Human;
use crate::problems::{self, Problem};

/// All that is shown.
#[derive(Debug, Default)]
pub struct Everything {
    volumes: Vec<PortableVolume>,
    /// Those that have not ended.
    migrations: Vec<VolumeMigration>,
    nodes: Vec<StorageNode>,
    networks: Vec<ContainerNetwork>,
}

/// Reads everything from the cluster that kubectl talks to.
pub async fn read() -> anyhow::Result<Everything> {
    let client = Client::try_default().await.context("can't find out which cluster to talk to: is KUBECONFIG set?")?;
    let mut migrations: Vec<VolumeMigration> = list(&client).await?;
    migrations.retain(|migration| !migration.phase().is_final());
    let (volumes, nodes, networks) = (list(&client).await?, list(&client).await?, list(&client).await?);
    Ok(Everything { volumes, migrations, nodes, networks })
}

pub(crate) async fn list<K>(client: &Client) -> anyhow::Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let plural = K::plural(&());
    match Api::<K>::all(client.clone()).list(&ListParams::default()).await {
        Ok(mut list) => {
            for item in &mut list.items {
                item.meta_mut().managed_fields = None;
            }
            Ok(list.items)
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => {
            bail!("this cluster has no {plural}: Portolan isn't installed there (helm install portolan …)")
        }
        Err(error) => Err(error).with_context(|| format!("can't list {plural}")),
    }
}

impl Everything {
    fn problems(&self) -> Vec<Problem> {
        let volumes = self.volumes.iter().flat_map(problems::of_volume);
        let nodes = self.nodes.iter().flat_map(problems::of_storage_node);
        volumes.chain(nodes).chain(self.networks.iter().flat_map(problems::of_network)).collect()
    }
}

/// Everything and its problems, for programs.
pub fn json(everything: &Everything) -> Value {
    json!({
        "volumes": everything.volumes,
        "migrations": everything.migrations,
        "storageNodes": everything.nodes,
        "networks": everything.networks,
        "problems": everything.problems(),
    })
}

/// Everything and its problems, for people.
pub fn tables(everything: &Everything) -> String {
    let mut text = String::new();
    let volumes = everything.volumes.iter().map(volume_row);
    section(&mut text, "VOLUMES", "VOLUME CLAIM NODE SIZE USED STATE COPIES", volumes);
    if !everything.migrations.is_empty() {
        let migrations = everything.migrations.iter().map(migration_row);
        section(&mut text, "MIGRATIONS", "MIGRATION OF NODE PHASE SENT MESSAGE", migrations);
    }
    let nodes = everything.nodes.iter().map(node_row);
    section(&mut text, "STORAGE NODES", "NODE POOL HEALTH SIZE FREE ZFS READY", nodes);
    let networks = everything.networks.iter().map(network_row);
    section(&mut text, "NETWORKS", "NETWORK SUBNETS VNI PODS USED FREE READY", networks);

    let problems = everything.problems();
    if problems.is_empty() {
        text.push_str("No problems.\n");
    } else {
        text.push_str("PROBLEMS\n");
    }
    for problem in problems {
        text.push_str(&format!("{}: {}\n  next: {}\n", problem.object, problem.message, problem.next));
    }
    text
}

pub(crate) fn section(text: &mut String, title: &str, header: &str, rows: impl ExactSizeIterator<Item = Vec<String>>) {
    text.push_str(title);
    text.push('\n');
    if rows.len() == 0 {
        text.push_str("none\n\n");
        return;
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.split(' '));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for line in table.to_string().lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push('\n');
}

fn or_dash(value: Option<&str>) -> String {
    value.filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

fn volume_row(volume: &PortableVolume) -> Vec<String> {
    let status = volume.status.clone().unwrap_or_default();
    let copies: Vec<&str> = status.replicas.iter().map(|replica| replica.node.as_str()).collect();
    vec![
        volume.name_any(),
        or_dash(Some(&volume.spec.claim)),
        or_dash(status.owner.as_deref()),
        volume.spec.size.clone(),
        or_dash(status.used.as_deref()),
        state(volume),
        or_dash(Some(&copies.join(","))),
    ]
}

fn state(volume: &PortableVolume) -> String {
    let status = volume.status.clone().unwrap_or_default();
    let phase = match status.phase {
        VolumePhase::Pending => "Pending",
        VolumePhase::Ready => "Ready",
        VolumePhase::Moving => "Moving",
        VolumePhase::Deleting => "Deleting",
    };
    let Some(handoff) = status.handoff else { return phase.to_owned() };
    let step = match handoff.phase {
        HandoffPhase::PreCopy => match handoff.warm {
            true => format!("is copied, about {} bytes are left", handoff.delta_bytes.unwrap_or_default()),
            false => format!("is being copied: round {}, {} bytes", handoff.rounds + 1, handoff.bytes),
        },
        HandoffPhase::Quiescing => format!("waits until {} has let go", handoff.from),
        HandoffPhase::FinalSync => format!("{} bytes received", handoff.bytes),
        HandoffPhase::Activating => "becomes writable".to_owned(),
    };
    format!("{phase} to {} ({step})", handoff.to)
}

fn migration_row(migration: &VolumeMigration) -> Vec<String> {
    let (spec, status) = (&migration.spec, migration.status.clone().unwrap_or_default());
    let claim = spec.claim.as_ref().map(|claim| format!("pvc/{claim}"));
    let of = claim.or_else(|| spec.pod.as_ref().map(|pod| format!("pod/{pod}")));
    vec![
        format!("{}/{}", migration.namespace().unwrap_or_default(), migration.name_any()),
        or_dash(of.as_deref()),
        spec.node.clone(),
        format!("{:?}", status.phase),
        Human(status.bytes).to_string(),
        or_dash(Some(&status.message)),
    ]
}

fn node_row(node: &StorageNode) -> Vec<String> {
    let status = node.status.clone().unwrap_or_default();
    vec![
        node.name_any(),
        node.spec.pool.clone(),
        or_dash(status.health.as_deref()),
        or_dash(status.capacity.as_deref()),
        or_dash(status.available.as_deref()),
        or_dash(status.zfs_version.as_deref()),
        ready(&status.conditions),
    ]
}

fn network_row(network: &ContainerNetwork) -> Vec<String> {
    let status = network.status.clone().unwrap_or_default();
    // IPv4 first, as the counts are.
    let mut subnets = network.spec.subnets.clone();
    subnets.sort_by_key(|subnet| subnet.contains(':'));
    let counts = |of: fn(AddressCounts) -> i64| {
        let counts = [status.ipv4, status.ipv6].into_iter().flatten().map(|it| of(it).to_string());
        or_dash(Some(&counts.collect::<Vec<_>>().join(",")))
    };
    vec![
        network.name_any(),
        subnets.join(","),
        status.vni.map_or_else(|| "-".to_owned(), |vni| vni.to_string()),
        status.endpoints.to_string(),
        counts(|it| it.used),
        counts(|it| it.free),
        ready(&status.conditions),
    ]
}

fn ready(conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]) -> String {
    or_dash(conditions.iter().find(|it| it.type_ == condition::READY).map(|it| it.status.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_cluster_has_no_problems() {
        let text = tables(&Everything::default());
        assert!(text.contains("VOLUMES\nnone"));
        assert!(text.ends_with("No problems.\n"));
    }

    #[test]
    fn a_network_has_its_subnets_and_what_is_free_of_each() {
        let network = |spec, status| {
            serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"subnets": spec}, "status": status}))
                .unwrap()
        };
        let counts =
            json!({"ipv4": {"used": 3, "free": 250}, "ipv6": {"used": 2, "free": 252}, "endpoints": 2, "vni": 4096});
        let networks = vec![
            network(json!(["fd32::/120", "10.32.0.0/24"]), counts),
            network(json!(["fd33::/64"]), json!({"ipv6": {"used": 0, "free": 16777214}})),
            network(json!(["10.33.0.0/16"]), json!({})),
        ];
        let text = tables(&Everything { networks, ..Default::default() });
        let rows: Vec<Vec<&str>> =
            text.lines().filter(|l| l.starts_with("n ")).map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["n", "10.32.0.0/24,fd32::/120", "4096", "2", "3,2", "250,252", "-"]);
        assert_eq!(rows[1], ["n", "fd33::/64", "-", "0", "0", "16777214", "-"]);
        assert_eq!(rows[2], ["n", "10.33.0.0/16", "-", "0", "-", "-", "-"]);
    }

    #[test]
    fn a_migration_is_seen_in_the_table() {
        let migration = json!({
            "metadata": {"name": "m", "namespace": "shop"},
            "spec": {"claim": "db", "node": "b"},
            "status": {"phase": "PreCopy", "bytes": 2048, "message": "data of db are sent"},
        });
        let migrations = vec![serde_json::from_value(migration).unwrap()];
        let text = tables(&Everything { migrations, ..Default::default() });
        let row: Vec<&str> = text.lines().find(|line| line.starts_with("shop/m")).unwrap().split_whitespace().collect();
        assert_eq!(row[..5], ["shop/m", "pvc/db", "b", "PreCopy", "2Ki"]);
    }

    #[test]
    fn a_move_is_seen_in_the_table() {
        let volume = json!({
            "metadata": {"name": "pvc-1"},
            "spec": {"size": "1Gi", "sizeBytes": 1, "claim": "default/db", "placement": {"node": "b"}},
            "status": {"owner": "a", "phase": "Moving", "replicas": [{"node": "a"}, {"node": "b"}],
                "handoff": {"from": "a", "to": "b", "epoch": 2, "phase": "FinalSync", "bytes": 4096}},
        });
        let everything = Everything { volumes: vec![serde_json::from_value(volume).unwrap()], ..Default::default() };
        let text = tables(&everything);
        let row = text.lines().find(|line| line.starts_with("pvc-1")).unwrap();
        for cell in ["default/db", "Moving to b (4096 bytes received)", "a,b"] {
            assert!(row.contains(cell), "{row}");
        }
        assert_eq!(json(&everything)["problems"].as_array().unwrap().len(), 1);
    }
}
