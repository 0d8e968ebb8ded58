//! The CNI executable against an agent that is a few lines long.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::Path,
    thread,
};

use portolan_cni::{Answer, Attached, Command, Environment, Failure, PortMapping, Request, Transport, run};
use serde_json::{Value, json};

/// With keys in no order, a number that a float can't hold and a space: what comes out must be this, byte for byte.
const PREVIOUS: &str = r#"{"ips":[{"address":"10.244.1.7/24"}],"interfaces":[{"name":"eth0","mtu": 9007199254740993}],"dns":{},"cniVersion":"1.0.0"}"#;

fn environment(command: &str) -> Environment {
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c0ffee"),
        ("CNI_NETNS", "/var/run/netns/cni-1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0;K8S_POD_UID=u-1"),
    ];
    variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// As [`environment`], with one variable of another value, or without it if that is empty.
fn with(variable: &str, value: &str, command: &str) -> Environment {
    let names = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];
    let given = |name| match name {
        _ if name == variable => value,
        "CNI_ARGS" => "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0",
        _ => "x",
    };
    let command = ("CNI_COMMAND".to_owned(), command.to_owned());
    names.into_iter().map(|name| (name.to_owned(), given(name).to_owned())).chain([command]).collect()
}

/// A configuration as text, with the previous result untouched.
fn config(socket: &Path, version: &str) -> String {
    let socket = serde_json::to_string(socket).unwrap();
    format!(
        r#"{{"cniVersion":"{version}","name":"primary","type":"portolan","agentSocket":{socket},"prevResult":{PREVIOUS}}}"#
    )
}

fn invoke(environment: &Environment, stdin: impl AsRef<[u8]>) -> (u8, Value) {
    let (code, output) = printed(environment, stdin.as_ref());
    let value = if output.is_empty() { Value::Null } else { serde_json::from_str(&output).unwrap() };
    (code, value)
}

fn printed(environment: &Environment, mut stdin: &[u8]) -> (u8, String) {
    let mut output = Vec::new();
    let code = run(environment, &mut stdin, &mut output);
    (code, String::from_utf8(output).unwrap())
}

/// An agent that answers one request; returns what it was asked.
fn agent(socket: &Path, answer: Answer) -> thread::JoinHandle<Request> {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        writeln!(stream, "{}", serde_json::to_string(&answer).unwrap()).unwrap();
        serde_json::from_str(&line).unwrap()
    })
}

#[test]
fn add_asks_the_agent_and_passes_the_result_on_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let asked = agent(&socket, Answer::default());
    let (code, output) = printed(&environment("ADD"), config(&socket, "1.0.0").as_bytes());
    assert_eq!((code, output.trim_end()), (0, PREVIOUS));
    let request = asked.join().unwrap();
    assert_eq!((request.command, request.container.as_str()), (Command::Add, "c0ffee"));
    assert_eq!(request.netns.as_deref(), Some("/var/run/netns/cni-1"));
    let pod = request.pod.unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_deref()), ("shop", "db-0", Some("u-1")));
}

/// The pod's own addresses are the primary plugin's to tell: both families, in each version's form, go on as they came.
#[test]
fn a_result_with_both_families_is_passed_on_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let old = r#"{"cniVersion":"0.3.1","ips":[{"version":"4","interface":0,"address":"10.244.1.7/24"},{"version":"6","interface":0,"address":"fd00::7/64"}],"dns":{}}"#;
    let new = r#"{"cniVersion":"1.1.0","ips":[{"interface":0,"address":"fd00::7/64"},{"interface":0,"address":"10.244.1.7/24"}],"dns":{}}"#;
    for (version, previous) in [("0.3.1", old), ("1.1.0", new)] {
        let socket = directory.path().join(version);
        let asked = agent(&socket, Answer::default());
        let stdin = config(&socket, version).replace(PREVIOUS, previous);
        let (code, output) = printed(&environment("ADD"), stdin.as_bytes());
        assert_eq!((code, output.trim_end()), (0, previous));
        asked.join().unwrap();
    }
}

#[test]
fn the_agents_refusal_reaches_the_runtime() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let failure =
        Failure::new(Failure::ANNOTATION, "annotation portolan.dev/networks names \"bckend\"", "there are: backend");
    let asked = agent(&socket, Answer { error: Some(failure), ..Answer::default() });
    let (code, output) = invoke(&environment("ADD"), config(&socket, "1.0.0"));
    assert_eq!((code, &output["code"], &output["cniVersion"]), (1, &json!(100), &json!("1.0.0")));
    assert_eq!(output["msg"], "annotation portolan.dev/networks names \"bckend\"");
    asked.join().unwrap();
}

#[test]
fn an_agent_that_is_down() {
    let stdin = config(Path::new("/nowhere/cni.sock"), "1.1.0");
    let (code, output) = invoke(&environment("ADD"), &stdin);
    assert_eq!((code, &output["code"]), (1, &json!(11)));
    assert!(output["msg"].as_str().unwrap().contains("/nowhere/cni.sock"), "{output}");
    assert!(output["details"].as_str().unwrap().contains("kubectl"), "{output}");
    assert_eq!(invoke(&environment("DEL"), &stdin), (0, Value::Null));
    assert_eq!(invoke(&environment("GC"), &stdin), (0, Value::Null));
    let (code, output) = invoke(&environment("STATUS"), &stdin);
    assert_eq!((code, &output["code"]), (1, &json!(50)));
}

#[test]
fn version_needs_no_agent() {
    let (code, output) = invoke(&environment("VERSION"), r#"{"cniVersion":"0.4.0"}"#);
    let versions = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    assert_eq!((code, output), (0, json!({"cniVersion": "0.4.0", "supportedVersions": versions})));
}

#[test]
fn wrong_input_is_refused_by_its_name() {
    let good = config(Path::new("/nowhere"), "1.0.0");
    let no_previous = r#"{"cniVersion":"1.0.0","name":"primary","type":"portolan"}"#;
    let wrong_previous = r#"{"cniVersion":"1.0.0","prevResult":["eth0"]}"#;
    let relative = good.replace("/nowhere", "nowhere");
    let cases = [
        (environment("ADD"), "no json", 6, "standard input"),
        (environment("ADD"), r#"{"cniVersion":"2.0.0"}"#, 1, "cniVersion: \"2.0.0\""),
        (environment("ADD"), r#"{"name":"primary"}"#, 1, "cniVersion"),
        (environment("ADD"), no_previous, 7, "prevResult"),
        (environment("ADD"), wrong_previous, 7, r#"prevResult: "[\"eth0\"]""#),
        (environment("ADD"), relative.as_str(), 7, r#"agentSocket: "\"nowhere\"""#),
        (environment("JUMP"), good.as_str(), 4, "CNI_COMMAND: \"JUMP\""),
        (with("CNI_CONTAINERID", "", "ADD"), good.as_str(), 4, "CNI_CONTAINERID"),
        (with("CNI_CONTAINERID", "../x", "DEL"), good.as_str(), 4, "CNI_CONTAINERID: \"../x\""),
        (with("CNI_NETNS", "", "ADD"), good.as_str(), 4, "CNI_NETNS"),
        (with("CNI_IFNAME", "", "DEL"), good.as_str(), 4, "CNI_IFNAME"),
        (with("CNI_IFNAME", "an-interface-too-long", "ADD"), good.as_str(), 4, "an-interface-too-long"),
        (with("CNI_IFNAME", "a/b", "ADD"), good.as_str(), 4, "CNI_IFNAME: \"a/b\""),
        (with("CNI_ARGS", "", "ADD"), good.as_str(), 4, "CNI_ARGS"),
        (with("CNI_ARGS", "K8S_POD_NAME", "ADD"), good.as_str(), 4, "CNI_ARGS: \"K8S_POD_NAME\""),
    ];
    for (environment, stdin, code, named) in cases {
        let (exit, output) = invoke(&environment, stdin);
        assert_eq!((exit, &output["code"]), (1, &json!(code)), "{output}");
        assert!(output["msg"].as_str().unwrap().contains(named), "{output} should name {named}");
    }
}

#[test]
fn bytes_that_are_no_text_are_refused_by_their_place() {
    use std::os::unix::ffi::OsStringExt;
    let (code, output) = invoke(&environment("ADD"), b"{\"cniVersion\":\"1.0.\xff\"}");
    assert_eq!((code, &output["code"]), (1, &json!(6)), "{output}");
    let name = std::ffi::OsString::from_vec(b"eth\xff".to_vec());
    let of_container = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c0ffee")];
    let variables = of_container.map(|(name, value)| (name.to_owned(), value.into()));
    let environment: Environment = variables.into_iter().chain([("CNI_IFNAME".to_owned(), name)]).collect();
    let (_, output) = invoke(&environment, config(Path::new("/nowhere"), "1.0.0"));
    assert_eq!(output["code"], json!(4));
    assert!(output["msg"].as_str().unwrap().contains("CNI_IFNAME: \"eth\u{fffd}\""), "{output}");
}

#[test]
fn a_configuration_that_is_too_long_is_not_cut() {
    let long = format!(r#"{{"cniVersion":"1.0.0","name":"{}"}}"#, "x".repeat(4 << 20));
    let (code, output) = invoke(&environment("ADD"), long);
    assert_eq!((code, &output["code"]), (1, &json!(6)));
    assert!(output["msg"].as_str().unwrap().contains("4 MiB"), "{output}");
}

#[test]
fn a_verb_is_refused_to_a_version_that_has_it_not() {
    for (command, first) in
        [("ADD", "0.3.0"), ("DEL", "0.3.0"), ("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")]
    {
        for version in portolan_cni::SUPPORTED_VERSIONS {
            let (_, output) = invoke(&environment(command), config(Path::new("/nowhere"), version));
            let refused = output["code"] == json!(1);
            assert_eq!(refused, version < first, "{command} of {version}: {output}");
            assert!(!refused || output["msg"].as_str().unwrap().contains(first), "{output}");
        }
    }
}

/// What a pod's deletion does not need can't hold it up.
#[test]
fn a_deletion_asks_only_for_what_it_needs() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let asked = agent(&socket, Answer::default());
    let stdin = config(&socket, "1.0.0").replace(r#""name""#, r#""cni.dev/valid-attachments":7,"name""#);
    assert_eq!(invoke(&with("CNI_ARGS", "no pairs", "DEL"), stdin), (0, Value::Null));
    assert_eq!(asked.join().unwrap().container, "x");
    let wrong_socket = config(&socket, "1.0.0").replace(r#""agentSocket":"#, r#""agentSocket":7,"was":"#);
    assert_eq!(invoke(&environment("DEL"), wrong_socket), (0, Value::Null));
}

#[test]
fn a_collection_says_what_is_still_there() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let with = |list: &str| {
        config(&socket, "1.1.0").replace(r#""name""#, &format!(r#""cni.dev/valid-attachments":{list},"name""#))
    };
    let (code, output) = invoke(&environment("GC"), with("7"));
    assert_eq!((code, &output["code"]), (1, &json!(7)));
    assert!(output["msg"].as_str().unwrap().contains("cni.dev/valid-attachments: \"7\""), "{output}");
    let asked = agent(&socket, Answer::default());
    assert_eq!(invoke(&environment("GC"), with(r#"[{"containerID":"c1","ifname":"eth0"}]"#)), (0, Value::Null));
    let attachments = asked.join().unwrap().attachments.unwrap();
    assert_eq!((attachments[0].container.as_str(), attachments[0].interface.as_str()), ("c1", "eth0"));
}

/// A configuration of a node without another plugin.
fn alone(socket: &Path, version: &str) -> String {
    let mappings = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"}]);
    json!({"cniVersion": version, "name": "portolan", "type": "portolan", "primary": true, "agentSocket": socket,
        "runtimeConfig": {"portMappings": mappings}})
    .to_string()
}

#[test]
fn where_there_is_no_other_plugin_the_result_is_the_agents() {
    let directory = tempfile::tempdir().unwrap();
    let attached: Attached = serde_json::from_value(json!({
        "interfaces": [{"name": "plp01234567", "mac": "02:50:a9:fe:01:01"},
            {"name": "eth0", "mac": "02:1f:0a:f4:01:05", "sandbox": "/var/run/netns/cni-1"}],
        "ips": [{"address": "10.244.1.5/32", "gateway": "169.254.1.1", "interface": 1},
            {"address": "fd44::5/128", "gateway": "fe80::1", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
    }))
    .unwrap();
    for version in portolan_cni::SUPPORTED_VERSIONS {
        let socket = directory.path().join(version);
        let asked = agent(&socket, Answer { result: Some(attached.clone()), error: None });
        let (code, output) = invoke(&environment("ADD"), alone(&socket, version));
        let mut expected = serde_json::to_value(&attached).unwrap();
        (expected["cniVersion"], expected["dns"]) = (json!(version), json!({}));
        if version < "1.0.0" {
            (expected["ips"][0]["version"], expected["ips"][1]["version"]) = (json!("4"), json!("6"));
        }
        assert_eq!((code, output), (0, expected));
        let request = asked.join().unwrap();
        assert!(request.primary && request.interface == "eth0");
        let [mapping] = &request.port_mappings[..] else { panic!("{request:?}") };
        assert_eq!((mapping.host_port, mapping.container_port), (8080, 80));
        assert_eq!(mapping.host_ip, Some("192.0.2.1".parse().unwrap()));
    }
    // As containerd writes it.
    let socket = directory.path().join("containerd");
    let asked = agent(&socket, Answer { result: Some(attached), error: None });
    let mut config: Value = serde_json::from_str(&alone(&socket, "1.0.0")).unwrap();
    config["runtimeConfig"]["portMappings"] =
        json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "udp", "HostIP": ""}]);
    assert_eq!(invoke(&environment("ADD"), config.to_string()).0, 0);
    let [mapping] = &asked.join().unwrap().port_mappings[..] else { panic!() };
    let expected = PortMapping { host_port: 8080, container_port: 80, protocol: Transport::Udp, host_ip: None };
    assert_eq!(*mapping, expected);
    // A deletion needs nothing but the container.
    let socket = directory.path().join("deletion");
    let asked = agent(&socket, Answer::default());
    let wrong = alone(&socket, "1.0.0").replace("8080", "\"x\"");
    assert_eq!(invoke(&environment("DEL"), wrong), (0, Value::Null));
    assert!(asked.join().unwrap().primary);
}

#[test]
fn a_pod_without_a_result_is_none_that_was_plugged_in() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let asked = agent(&socket, Answer::default());
    let (code, output) = invoke(&environment("ADD"), alone(&socket, "1.0.0"));
    assert_eq!((code, &output["code"]), (1, &json!(11)), "{output}");
    asked.join().unwrap();
    let wrong = alone(&socket, "1.0.0").replace("true", "\"yes\"");
    let (_, output) = invoke(&environment("ADD"), wrong);
    assert_eq!(output["code"], json!(7));
    assert!(output["msg"].as_str().unwrap().contains("primary: \"\\\"yes\\\"\""), "{output}");
}
