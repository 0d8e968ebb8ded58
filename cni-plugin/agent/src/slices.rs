//! This node's NetworkNodeSlices: what the other nodes know of it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
    runtime::reflector::ObjectRef,
};
use portolan_crds::{NetworkNodeSlice, NetworkNodeSliceSpec, slice_name};

use crate::{cluster::Cluster, error::ApiError};

const FIELD_MANAGER: &str = "portolan-agent";
/// The label by which an agent can watch only the slices of its networks.
const NETWORK_LABEL: &str = "portolan.dev/network";
/// The longest value of a label.
const LABEL_LIMIT: usize = 63;
/// How long the watch may take to show what we wrote, before we take it for undone by someone else.
const ECHO: Duration = Duration::from_secs(5);

/// What was written last, while the watch may not have shown it yet.
#[derive(Default)]
pub(crate) struct Slices {
    written: BTreeMap<String, (NetworkNodeSliceSpec, Instant)>,
}

impl Slices {
    /// Writes a slice if it isn't what it should be.
    pub async fn write(&mut self, cluster: &Cluster, spec: NetworkNodeSliceSpec) -> Result<(), ApiError> {
        let name = slice_name(&spec.network, &spec.node);
        let present = cluster.slices.get(&ObjectRef::new(&name));
        let just_written = self.written.get(&name).is_some_and(|(s, at)| *s == spec && at.elapsed() < ECHO);
        if just_written || present.is_some_and(|p| p.spec == spec) {
            return Ok(());
        }
        let mut slice = NetworkNodeSlice::new(&name, spec.clone());
        slice.metadata.owner_references = Some(vec![cluster.node_reference().await?.clone()]);
        if spec.network.len() <= LABEL_LIMIT {
            slice.labels_mut().insert(NETWORK_LABEL.to_owned(), spec.network.clone());
        }
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let written = api(cluster).patch(&name, &parameters, &Patch::Apply(&slice)).await;
        written.map_err(|e| ApiError::new(format!("write NetworkNodeSlice {name}"), e))?;
        self.written.insert(name, (spec, Instant::now()));
        Ok(())
    }

    /// Removes the slices of networks that this node has no pods on.
    pub async fn keep_only(&mut self, cluster: &Cluster, networks: &[String]) -> Result<(), ApiError> {
        for slice in cluster.slices.state() {
            if slice.spec.node != cluster.node || networks.contains(&slice.spec.network) {
                continue;
            }
            let name = slice.name_any();
            match api(cluster).delete(&name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(e) => return Err(ApiError::new(format!("delete NetworkNodeSlice {name}"), e)),
                Ok(_) => drop(self.written.remove(&name)),
            }
        }
        Ok(())
    }
}

fn api(cluster: &Cluster) -> Api<NetworkNodeSlice> {
    Api::all(cluster.client.clone())
}
