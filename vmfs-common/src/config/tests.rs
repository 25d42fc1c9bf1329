//! Parsing, checks and the documented example.

use super::*;

const EXAMPLE: &str = include_str!("../../../examples/vmfs.toml");

const MINIMAL: &str = r#"
host = "a"
[store]
dir = "/s"
[identity]
dir = "id"
"#;

fn error(text: &str) -> String {
    Config::parse(text).unwrap_err().to_string()
}

fn with(extra: &str) -> String {
    format!("{MINIMAL}{extra}")
}

#[test]
fn minimal_file_gets_the_defaults() {
    let config = Config::parse(MINIMAL).unwrap();
    assert_eq!(config.network.listen, "0.0.0.0:4410".parse().unwrap());
    assert_eq!(config.control.socket, Path::new(DEFAULT_SOCKET));
    assert_eq!(config.replication, ReplicationConfig::default());
    assert_eq!(config.mount, None);
    assert_eq!(config.policy_for("x"), PolicyRule::fallback());
}

#[test]
fn example_parses_and_its_commented_defaults_are_the_defaults() {
    let example = Config::parse(EXAMPLE).unwrap();
    assert_eq!(example.host.as_str(), "a");
    // Every line `#key = value` is a default: with all of them uncommented nothing may change.
    let mut set = 0;
    let uncommented: String = EXAMPLE
        .lines()
        .map(|line| {
            let bare = line
                .strip_prefix('#')
                .filter(|l| l.starts_with(|c: char| c.is_ascii_lowercase() || c == '['));
            set += usize::from(bare.is_some());
            format!("{}\n", bare.unwrap_or(line))
        })
        .collect();
    assert_eq!(Config::parse(&uncommented).unwrap(), example);
    assert_eq!(set, 16, "defaults shown in the example");
}

#[test]
fn example_names_every_key() {
    let mut config = Config::parse(EXAMPLE).unwrap();
    config.store.log_retain = Some(ByteSize::mib(256));
    config.control.pid_file = Some("/run/x".into());
    config.network.advertise = Some("h:1".parse().unwrap());
    config.control.metrics_listen = Some(SocketAddr::from(([127, 0, 0, 1], 9464)));
    let mut all = config.to_toml();
    all.push_str("\n[[policy]]\npattern = \"x\"\nreplicas = 1\nwitnesses = [\"w\"]\n");
    for line in all.lines() {
        let key = line.split(" = ").next().unwrap().trim();
        assert!(EXAMPLE.contains(key), "{key:?} is not in the example");
    }
}

#[test]
fn what_is_written_reads_back() {
    let config = Config::parse(EXAMPLE).unwrap();
    assert_eq!(Config::parse(&config.to_toml()).unwrap(), config);
}

#[test]
fn errors_name_line_and_column() {
    assert_eq!(error("host = \"a\"\n  colour = 1\n").split(':').next(), Some("line 2, column 3"));
    assert!(error(&with("colour = 1\n")).contains("unknown field `colour`"));
    assert!(error("host = \"a\n").starts_with("line 1, column "));
    assert!(error("").contains("missing field `host`"));
    let text = with("[replication]\nlease = \"soon\"\n");
    assert_eq!(
        error(&text),
        "line 8, column 9: \"soon\" is not a duration such as \"500ms\" (ms, s, m, h, d)"
    );
    let text = with("[replication]\nring = 5\n");
    assert!(error(&text).starts_with("line 8, column 8: invalid type: integer `5`"), "{}", error(&text));
    let text = with("[[policy]]\npattern = \"x\"\nacks = \"some\"\n");
    assert!(error(&text).starts_with("line 9, column 8: unknown variant `some`"), "{}", error(&text));
    for text in ["\u{feff}", "é = ", "[", "a.b.c = {", "host = 1", "\0"] {
        assert!(!error(text).contains('\n'), "{text:?}");
    }
}

#[test]
fn values_that_do_not_fit_together_are_refused() {
    for (extra, expected) in [
        ("[replication]\nlease = \"1ms\"\n", "replication.lease: 1ms is out of range (200ms to 1m)"),
        ("[peers]\na = \"h:1\"\n", "peers: a is this host itself"),
        ("[mount]\npoint = \"/m\"\n", "witness: a witness holds no data: it cannot have a [mount]"),
        (
            "[mount]\npoint = \"/s/m\"\n",
            "mount.point: the mount point and the store may not be inside each other",
        ),
        ("[[policy]]\npattern = \"x\"\nwitnesses = [\"a\"]\n", "policy 1 (\"x\"): a is this host itself"),
        (
            "[peers]\nb = \"h:1\"\n[[policy]]\npattern = \"x\"\nreplicas = [\"b\"]\nwitnesses = [\"b\"]\n",
            "policy 1 (\"x\"): b is named twice",
        ),
        ("[[policy]]\npattern = \"x\"\nreplicas = 16\n", "policy 1 (\"x\"): an image has at most 16 members"),
    ] {
        let witness = if expected.starts_with("witness") { "witness = true\n" } else { "" };
        let error = error(&format!("{witness}{}", with(extra)));
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn first_matching_policy_counts() {
    let config = Config::parse(&with(
        "[peers]\nb = \"h:1\"\n\
         [[policy]]\npattern = \"scratch/**\"\nreplicas = 0\nacks = \"local\"\n\
         [[policy]]\npattern = \"**\"\nreplicas = [\"b\"]\non_quorum_loss = \"degrade\"\n",
    ))
    .unwrap();
    assert_eq!(config.policy_for("scratch/x").image_policy().acks, Acks::Local);
    assert_eq!(config.policy_for("scratch/x").replicas, Replicas::Count(0));
    assert_eq!(config.policy_for("vm.img").on_quorum_loss, OnQuorumLoss::Degrade);
}

#[test]
fn relative_paths_are_taken_from_the_files_directory() {
    let mut config = Config::parse(MINIMAL).unwrap();
    config.resolve(Path::new("/etc/vmfs"));
    assert_eq!(config.store.dir, Path::new("/s"));
    assert_eq!(config.identity.dir, Path::new("/etc/vmfs/id"));
}

#[test]
fn every_example_is_valid() {
    for (name, text) in [
        ("a", include_str!("../../../examples/two-hosts-and-witness/a.toml")),
        ("b", include_str!("../../../examples/two-hosts-and-witness/b.toml")),
        ("w", include_str!("../../../examples/two-hosts-and-witness/w.toml")),
    ] {
        let config = Config::parse(text).unwrap();
        assert_eq!((config.host.as_str(), config.mount.is_some()), (name, name != "w"));
    }
}
