//! What the container runtime gives: environment and configuration. Parsed into types, or refused by the field's name.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{Attachment, Command, Failure, PodName, Request};

/// The versions of the specification that this executable speaks.
pub const SUPPORTED_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The version of results when the configuration names none.
pub(crate) const NEWEST_VERSION: &str = "1.1.0";
/// Where the agent listens, as the host sees it.
pub const DEFAULT_SOCKET: &str = "/run/portolan/cni.sock";
/// More than any configuration needs.
const CONFIG_LIMIT: u64 = 4 << 20;

/// The `CNI_*` environment variables.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

/// The plugin's configuration: only the keys that matter here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    #[serde(default)]
    pub cni_version: Option<String>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default)]
    agent_socket: Option<String>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
}

impl Environment {
    /// This process's own.
    pub fn from_process() -> Self {
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect()
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn need(&self, name: &str, allowed: &str) -> Result<&str, Failure> {
        self.get(name).ok_or_else(|| Failure::input(Failure::INVALID_ENVIRONMENT, name, "", allowed))
    }

    pub(crate) fn command(&self) -> Result<Command, Failure> {
        let allowed = "ADD, DEL, CHECK, GC, STATUS, VERSION";
        let given = self.need("CNI_COMMAND", allowed)?;
        serde_json::from_value(Value::from(given))
            .map_err(|_| Failure::input(Failure::INVALID_ENVIRONMENT, "CNI_COMMAND", given, allowed))
    }

    pub(crate) fn request(&self, command: Command, config: &Config) -> Result<Request, Failure> {
        let of_container = matches!(command, Command::Add | Command::Delete | Command::Check);
        let mut request = Request {
            command,
            container: String::new(),
            netns: self.get("CNI_NETNS").map(str::to_owned),
            interface: String::new(),
            pod: self.pod()?,
            attachments: config.valid_attachments.clone(),
        };
        if of_container {
            request.container = self.container()?;
            request.interface = self.need("CNI_IFNAME", "the name of an interface, such as eth0")?.to_owned();
        }
        if matches!(command, Command::Add | Command::Check) {
            self.need("CNI_NETNS", "the path of a network namespace")?;
        }
        if command == Command::Add && request.pod.is_none() {
            let allowed = "K8S_POD_NAMESPACE=…;K8S_POD_NAME=…, as Kubernetes' container runtimes give it";
            let given = self.get("CNI_ARGS").unwrap_or_default();
            return Err(Failure::input(Failure::INVALID_ENVIRONMENT, "CNI_ARGS", given, allowed));
        }
        Ok(request)
    }

    fn container(&self) -> Result<String, Failure> {
        let allowed = "letters, digits, '_', '.' and '-', a letter or digit first";
        let given = self.need("CNI_CONTAINERID", allowed)?;
        let fine = given.starts_with(|c: char| c.is_ascii_alphanumeric())
            && given.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        fine.then(|| given.to_owned())
            .ok_or_else(|| Failure::input(Failure::INVALID_ENVIRONMENT, "CNI_CONTAINERID", given, allowed))
    }

    fn pod(&self) -> Result<Option<PodName>, Failure> {
        let mut arguments = BTreeMap::new();
        for pair in self.get("CNI_ARGS").unwrap_or_default().split(';').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                Failure::input(Failure::INVALID_ENVIRONMENT, "CNI_ARGS", pair, "KEY=VALUE pairs, separated by ';'")
            })?;
            arguments.insert(key, value);
        }
        let get = |key: &str| arguments.get(key).filter(|v| !v.is_empty()).map(|v| (*v).to_owned());
        let both = get("K8S_POD_NAMESPACE").zip(get("K8S_POD_NAME"));
        Ok(both.map(|(namespace, name)| PodName { namespace, name, uid: get("K8S_POD_UID") }))
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(variables: T) -> Self {
        Self(variables.into_iter().filter(|(name, _)| name.starts_with("CNI_")).collect())
    }
}

impl Config {
    pub(crate) fn read(stdin: &mut dyn Read) -> Result<Self, Failure> {
        let mut text = String::new();
        stdin
            .take(CONFIG_LIMIT)
            .read_to_string(&mut text)
            .map_err(|e| Failure::new(Failure::INPUT, format!("standard input can't be read: {e}"), ""))?;
        serde_json::from_str(&text).map_err(|e| {
            let msg = format!("standard input is not a network configuration: {e}");
            Failure::new(Failure::DECODE, msg, "allowed: a JSON object with cniVersion, name and type")
        })
    }

    pub(crate) fn check_version(&self) -> Result<(), Failure> {
        let given = self.cni_version.as_deref().unwrap_or_default();
        if SUPPORTED_VERSIONS.contains(&given) {
            return Ok(());
        }
        Err(Failure::input(Failure::INCOMPATIBLE_VERSION, "cniVersion", given, &SUPPORTED_VERSIONS.join(", ")))
    }

    pub(crate) fn previous_result(&self) -> Result<Value, Failure> {
        let allowed = "the result of the plugin before this one: portolan is chained after the node's own plugin";
        self.prev_result
            .clone()
            .filter(Value::is_object)
            .ok_or_else(|| Failure::input(Failure::INVALID_CONFIG, "prevResult", "", allowed))
    }

    pub(crate) fn socket(&self) -> &Path {
        Path::new(self.agent_socket.as_deref().unwrap_or(DEFAULT_SOCKET))
    }
}
