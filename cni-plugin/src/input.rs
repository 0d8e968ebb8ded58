//! What the container runtime gives: environment and configuration. Parsed into types, or refused by the field's name.
//!
//! Each verb asks only for what it needs: what is wrong with the rest is no reason to keep a pod from being deleted.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::Read,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use crate::{Attachment, Command, Failure, PodName, PortMapping, Request};

/// The versions of the specification that this executable speaks, in their order.
pub const SUPPORTED_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The version of results when the configuration names none.
pub(crate) const NEWEST_VERSION: &str = "1.1.0";
/// Where the agent listens, as the host sees it.
pub const DEFAULT_SOCKET: &str = "/run/portolan/cni.sock";
/// In bytes. More than any configuration needs.
const CONFIG_LIMIT: u64 = 4 << 20;
/// The kernel's IFNAMSIZ without the final zero.
const LONGEST_INTERFACE: usize = 15;

/// The `CNI_*` environment variables.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, OsString>);

/// The plugin's configuration: only the keys that matter here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    #[serde(default)]
    pub cni_version: Option<String>,
    #[serde(default)]
    prev_result: Option<Box<RawValue>>,
    #[serde(default)]
    agent_socket: Value,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Value,
    #[serde(default)]
    primary: Value,
    #[serde(default)]
    runtime_config: Value,
}

impl Environment {
    /// This process's own.
    pub fn from_process() -> Self {
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect()
    }

    /// A variable's value; an empty one is as good as none.
    fn get(&self, name: &str, allowed: &str) -> Result<Option<&str>, Failure> {
        let Some(value) = self.0.get(name).filter(|value| !value.is_empty()) else { return Ok(None) };
        let refused = || refused_variable(name, &value.to_string_lossy(), allowed);
        value.to_str().map(Some).ok_or_else(refused)
    }

    fn need(&self, name: &str, allowed: &str) -> Result<&str, Failure> {
        self.get(name, allowed)?.ok_or_else(|| refused_variable(name, "", allowed))
    }

    pub(crate) fn command(&self) -> Result<Command, Failure> {
        let allowed = "ADD, DEL, CHECK, GC, STATUS, VERSION";
        let given = self.need("CNI_COMMAND", allowed)?;
        serde_json::from_value(Value::from(given)).map_err(|_| refused_variable("CNI_COMMAND", given, allowed))
    }

    pub(crate) fn request(&self, command: Command, config: &Config) -> Result<Request, Failure> {
        let mut request = Request {
            command,
            container: String::new(),
            netns: None,
            interface: String::new(),
            pod: None,
            attachments: None,
            primary: config.is_primary(),
            port_mappings: Vec::new(),
        };
        if matches!(command, Command::Add | Command::Delete | Command::Check) {
            request.container = self.container()?;
            request.interface = self.interface()?;
            request.netns = self.get("CNI_NETNS", NETNS)?.map(str::to_owned);
            request.pod = self.pod().or_else(|e| if command == Command::Add { Err(e) } else { Ok(None) })?;
        }
        match command {
            _ if command != Command::Delete && !(config.primary.is_boolean() || config.primary.is_null()) => {
                let given = config.primary.to_string();
                return Err(Failure::input(Failure::INVALID_CONFIG, "primary", &given, "true, false"));
            }
            Command::Add if request.pod.is_none() => {
                let allowed = "K8S_POD_NAMESPACE=…;K8S_POD_NAME=…, as Kubernetes' container runtimes give it";
                return Err(refused_variable("CNI_ARGS", self.get("CNI_ARGS", ARGS)?.unwrap_or_default(), allowed));
            }
            Command::Add | Command::Check if request.netns.is_none() => {
                return Err(refused_variable("CNI_NETNS", "", NETNS));
            }
            Command::Collect => request.attachments = config.attachments()?,
            Command::Add if request.primary => request.port_mappings = config.port_mappings()?,
            _ => {}
        }
        Ok(request)
    }

    fn container(&self) -> Result<String, Failure> {
        let allowed = "letters, digits, '_', '.' and '-', a letter or digit first";
        let given = self.need("CNI_CONTAINERID", allowed)?;
        let fine = given.starts_with(|c: char| c.is_ascii_alphanumeric())
            && given.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        fine.then(|| given.to_owned()).ok_or_else(|| refused_variable("CNI_CONTAINERID", given, allowed))
    }

    fn interface(&self) -> Result<String, Failure> {
        let allowed = "the name of an interface, such as eth0: at most 15 bytes, without '/', ':' and spaces";
        let given = self.need("CNI_IFNAME", allowed)?;
        let fine = given.len() <= LONGEST_INTERFACE
            && !matches!(given, "." | "..")
            && !given.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace());
        fine.then(|| given.to_owned()).ok_or_else(|| refused_variable("CNI_IFNAME", given, allowed))
    }

    fn pod(&self) -> Result<Option<PodName>, Failure> {
        let mut arguments = BTreeMap::new();
        for pair in self.get("CNI_ARGS", ARGS)?.unwrap_or_default().split(';').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| refused_variable("CNI_ARGS", pair, ARGS))?;
            arguments.insert(key, value);
        }
        let get = |key: &str| arguments.get(key).filter(|v| !v.is_empty()).map(|v| (*v).to_owned());
        let both = get("K8S_POD_NAMESPACE").zip(get("K8S_POD_NAME"));
        Ok(both.map(|(namespace, name)| PodName { namespace, name, uid: get("K8S_POD_UID") }))
    }
}

const NETNS: &str = "the path of a network namespace";
const ARGS: &str = "KEY=VALUE pairs, separated by ';'";

fn refused_variable(name: &str, given: &str, allowed: &str) -> Failure {
    Failure::input(Failure::INVALID_ENVIRONMENT, name, given, allowed)
}

impl<V: AsRef<OsStr>> FromIterator<(String, V)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, V)>>(variables: T) -> Self {
        let ours = variables.into_iter().filter(|(name, _)| name.starts_with("CNI_"));
        Self(ours.map(|(name, value)| (name, value.as_ref().to_owned())).collect())
    }
}

impl Config {
    pub(crate) fn read(stdin: &mut dyn Read) -> Result<Self, Failure> {
        let mut text = Vec::new();
        stdin
            .take(CONFIG_LIMIT + 1)
            .read_to_end(&mut text)
            .map_err(|e| Failure::new(Failure::INPUT, format!("standard input can't be read: {e}"), ""))?;
        let allowed = "allowed: a JSON object with cniVersion, name and type, of at most 4 MiB";
        if text.len() as u64 > CONFIG_LIMIT {
            return Err(Failure::new(Failure::DECODE, "standard input has more than 4 MiB", allowed));
        }
        serde_json::from_slice(&text).map_err(|e| {
            Failure::new(Failure::DECODE, format!("standard input is not a network configuration: {e}"), allowed)
        })
    }

    /// Whether the configuration's version is one of ours, and has the verb.
    pub(crate) fn check_version(&self, command: Command) -> Result<(), Failure> {
        let since = match command {
            Command::Add | Command::Delete | Command::Version => "0.3.0",
            Command::Check => "0.4.0",
            Command::Collect | Command::Status => "1.1.0",
        };
        let allowed: Vec<&str> = SUPPORTED_VERSIONS.into_iter().skip_while(|version| *version != since).collect();
        let given = self.cni_version.as_deref().unwrap_or_default();
        if allowed.contains(&given) {
            return Ok(());
        }
        Err(Failure::input(Failure::INCOMPATIBLE_VERSION, "cniVersion", given, &allowed.join(", ")))
    }

    /// The result of the plugin before this one, byte for byte.
    pub(crate) fn previous_result(&self) -> Result<Box<RawValue>, Failure> {
        let allowed = "the result of the plugin before this one: portolan is chained after the node's own plugin";
        let given = self.prev_result.as_deref();
        given.filter(|result| result.get().starts_with('{')).map(ToOwned::to_owned).ok_or_else(|| {
            let given = given.map(RawValue::get).unwrap_or_default();
            Failure::input(Failure::INVALID_CONFIG, "prevResult", given, allowed)
        })
    }

    pub(crate) fn socket(&self) -> Result<PathBuf, Failure> {
        match &self.agent_socket {
            Value::Null => Ok(PathBuf::from(DEFAULT_SOCKET)),
            Value::String(path) if Path::new(path).is_absolute() => Ok(PathBuf::from(path)),
            given => {
                let allowed = format!("an absolute path, such as {DEFAULT_SOCKET}");
                Err(Failure::input(Failure::INVALID_CONFIG, "agentSocket", &given.to_string(), &allowed))
            }
        }
    }

    /// Whether this is the node's own plugin, and chained after none.
    pub(crate) fn is_primary(&self) -> bool {
        self.primary == Value::Bool(true)
    }

    fn port_mappings(&self) -> Result<Vec<PortMapping>, Failure> {
        let field = "runtimeConfig.portMappings";
        let refused = |given: &Value| {
            let allowed = "a list of objects with hostPort and containerPort from 1 to 65535, protocol tcp, udp or sctp, and hostIP, an address or nothing";
            Failure::input(Failure::INVALID_CONFIG, field, &given.to_string(), allowed)
        };
        let given = match self.runtime_config.get("portMappings") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(given) => given,
        };
        let one = |mapping: &Value| {
            let parsed: PortMapping = serde_json::from_value(canonical(mapping)?).ok()?;
            (parsed.host_port != 0 && parsed.container_port != 0).then_some(parsed)
        };
        given
            .as_array()
            .ok_or_else(|| refused(given))?
            .iter()
            .map(|mapping| one(mapping).ok_or_else(|| refused(mapping)))
            .collect()
    }

    fn attachments(&self) -> Result<Option<Vec<Attachment>>, Failure> {
        serde_json::from_value(self.valid_attachments.clone()).map_err(|_| {
            let allowed = "a list of objects with containerID and ifname";
            let given = self.valid_attachments.to_string();
            Failure::input(Failure::INVALID_CONFIG, "cni.dev/valid-attachments", &given, allowed)
        })
    }
}

/// A port mapping as the conventions write it. containerd writes the names as `HostPort` and `HostIP`, which Go's JSON takes for the same, an
/// address that isn't given as an empty one, and others the protocol as Kubernetes does.
fn canonical(mapping: &Value) -> Option<Value> {
    let mut canonical = Map::new();
    for (key, value) in mapping.as_object()? {
        let (key, value) = match key.to_ascii_lowercase().as_str() {
            "hostport" => ("hostPort", value.clone()),
            "containerport" => ("containerPort", value.clone()),
            "protocol" => ("protocol", value.as_str().map(str::to_ascii_lowercase).into()),
            "hostip" if value == "" => ("hostIP", Value::Null),
            "hostip" => ("hostIP", value.clone()),
            _ => continue,
        };
        canonical.insert(key.to_owned(), value);
    }
    Some(canonical.into())
}
