//! Sizes, durations, names and patterns as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Text that is not a value of its kind. Says what is wrong and what is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

fn bad<T>(message: String) -> Result<T, ValueError> {
    Err(ValueError(message))
}

const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const TIME_UNITS_MS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A number of bytes, written `"64MiB"`: a whole number and one of `B`, `KiB`, `MiB`, `GiB`, `TiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// Wraps a number of bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }
    /// So many MiB.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }
    /// The number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
    /// Rounded, for people: `1.2 MiB`.
    #[must_use]
    pub fn human(self) -> String {
        let Some((unit, factor)) = SIZE_UNITS.iter().find(|(_, f)| self.0 >= *f && *f > 1) else {
            return format!("{} B", self.0);
        };
        // Tenths, in integers: exact up to the largest size there is.
        let tenths = (u128::from(self.0) * 10 + u128::from(*factor) / 2) / u128::from(*factor);
        if tenths.is_multiple_of(10) {
            format!("{} {unit}", tenths / 10)
        } else {
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_exact(self.0, &SIZE_UNITS, "B", f)
    }
}

impl FromStr for ByteSize {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse_exact(text, &SIZE_UNITS, "a size such as \"64MiB\" (B, KiB, MiB, GiB, TiB)").map(Self)
    }
}

/// A length of time, written `"500ms"`: a whole number and one of `ms`, `s`, `m`, `h`, `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeSpan(u64);

impl TimeSpan {
    /// So many milliseconds.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms)
    }
    /// So many seconds.
    #[must_use]
    pub const fn from_secs(s: u64) -> Self {
        Self(s * 1000)
    }
    /// In milliseconds.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }
    /// As the standard library's type.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_exact(self.0, &TIME_UNITS_MS, "ms", f)
    }
}

impl FromStr for TimeSpan {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse_exact(text, &TIME_UNITS_MS, "a duration such as \"500ms\" (ms, s, m, h, d)").map(Self)
    }
}

fn fmt_exact(value: u64, units: &[(&str, u64)], smallest: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match units.iter().find(|(_, factor)| value != 0 && value.is_multiple_of(*factor)) {
        Some((unit, factor)) => f.pad(&format!("{}{unit}", value / factor)),
        None => f.pad(&format!("{value}{smallest}")),
    }
}

fn parse_exact(text: &str, units: &[(&str, u64)], wanted: &str) -> Result<u64, ValueError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shown: String = text.chars().take(40).collect();
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit.trim_start()) else {
        return bad(format!("{shown:?} is not {wanted}"));
    };
    if number.is_empty() {
        return bad(format!("{shown:?} is not {wanted}"));
    }
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(*factor)) {
        Some(value) => Ok(value),
        None => bad(format!("{shown:?} is too large")),
    }
}

/// Longest name of a host in bytes.
pub const HOST_NAME_BYTES_MAX: usize = 63;

/// The name of a host, as in its certificate: letters, digits, `-`, `_` and `.`, the first one a letter
/// or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(String);

impl HostName {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for HostName {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let sound = text.bytes().all(inner) && text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if sound && text.len() <= HOST_NAME_BYTES_MAX {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(80).collect();
        bad(format!(
            "{shown:?} is not a host name (1 to {HOST_NAME_BYTES_MAX} of a-z, 0-9 and inner hyphens)"
        ))
    }
}

/// `HOST:PORT` of a peer; the host is an address (IPv6 in brackets) or a name that is resolved anew at
/// every connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerAddress {
    host: String,
    port: u16,
}

impl PeerAddress {
    /// The name or address, an IPv6 address without its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }
    /// The UDP port, never 0.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        f.pad(&format!("{open}{}{close}:{}", self.host, self.port))
    }
}

impl FromStr for PeerAddress {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let port = port.parse::<u16>().ok().filter(|p| *p != 0)?;
            let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
            let host = match bracketed {
                Some(v6) => v6.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
                None => host.to_owned(),
            };
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            let sound = bracketed.is_some() || (!host.is_empty() && host.bytes().all(plain));
            (sound && host.len() <= 253).then_some(Self { host, port })
        });
        let shown: String = text.chars().take(80).collect();
        parsed.ok_or_else(|| ValueError(format!("{shown:?} is not HOST:PORT")))
    }
}

/// Longest pattern in bytes.
pub const PATTERN_BYTES_MAX: usize = 1024;

/// A pattern for whole paths inside the mount: `?` is one character and `*` any number of them, both
/// within one name; `**` also spans slashes, and `**/` may stand for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PathPattern(String);

impl PathPattern {
    /// The pattern that matches every path.
    #[must_use]
    pub fn everything() -> Self {
        Self("**".to_owned())
    }
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// True when the whole of `path` (without a leading slash) matches. Time is bounded by the
    /// product of the two lengths.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let path: Vec<char> = path.chars().collect();
        // reach[i]: what was read of the pattern so far can stand for path[..i].
        let mut reach = vec![false; path.len() + 1];
        reach[0] = true;
        let mut rest = self.0.as_str();
        while let Some(first) = rest.chars().next() {
            if let Some(after) = rest.strip_prefix("**/") {
                // Nothing, or anything that ends in a slash.
                let mut open = false;
                for i in 0..=path.len() {
                    let here = reach[i] || (open && path[i - 1] == '/');
                    open |= reach[i];
                    reach[i] = here;
                }
                rest = after;
            } else if let Some(after) = rest.strip_prefix("**") {
                for i in 1..=path.len() {
                    reach[i] |= reach[i - 1];
                }
                rest = after;
            } else if first == '*' {
                for i in 1..=path.len() {
                    reach[i] |= reach[i - 1] && path[i - 1] != '/';
                }
                rest = &rest[1..];
            } else {
                for i in (1..=path.len()).rev() {
                    let fits = if first == '?' { path[i - 1] != '/' } else { path[i - 1] == first };
                    reach[i] = reach[i - 1] && fits;
                }
                reach[0] = false;
                rest = &rest[first.len_utf8()..];
            }
        }
        reach[path.len()]
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for PathPattern {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let shown: String = text.chars().take(80).collect();
        if text.is_empty() || text.len() > PATTERN_BYTES_MAX {
            return bad(format!("{shown:?} is not a pattern of 1 to {PATTERN_BYTES_MAX} bytes"));
        }
        if text.starts_with('/') {
            return bad(format!(
                "{shown:?}: a pattern is for paths inside the mount and has no leading slash"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

macro_rules! as_text {
    ($($name:ty),*) => { $(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )* };
}
as_text!(ByteSize, TimeSpan, HostName, PeerAddress, PathPattern);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_exactly_and_print_back() {
        for (text, bytes) in [("0B", 0), ("1B", 1), ("1536B", 1536), ("64MiB", 64 << 20), ("2TiB", 2 << 40)] {
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)), "{text}");
        }
        assert_eq!(ByteSize(1536).to_string(), "1536B");
        assert_eq!(ByteSize(64 << 20).to_string(), "64MiB");
        assert_eq!("64 MiB".parse::<ByteSize>(), Ok(ByteSize::mib(64)));
        for bad in [
            "",
            "64",
            "MiB",
            "64MB",
            "64mib",
            "-1B",
            "1.5GiB",
            "64MiB ",
            "99999999999TiB",
            "18446744073709551616B",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_for_people_are_rounded_to_tenths() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1_258_291, "1.2 MiB"),
            (5 << 30, "5 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(ByteSize(bytes).human(), text);
        }
    }

    #[test]
    fn durations_parse_exactly_and_print_back() {
        for (text, ms) in [("0ms", 0), ("500ms", 500), ("2s", 2000), ("10m", 600_000), ("7d", 604_800_000)] {
            assert_eq!(text.parse::<TimeSpan>(), Ok(TimeSpan(ms)), "{text}");
            assert_eq!(TimeSpan(ms).to_string(), text);
        }
        for bad in ["", "5", "s", "5 min", "-1s", "1.5s", "999999999999999999d"] {
            assert!(bad.parse::<TimeSpan>().is_err(), "{bad}");
        }
    }

    #[test]
    fn host_names_are_checked() {
        for good in ["a", "host-1", "0", "A.b_c", &"x".repeat(63)] {
            assert!(good.parse::<HostName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "ä", "a/b", "..", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<HostName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["127.0.0.1:1", "[::1]:4433", "store-1.example:65535"] {
            assert_eq!(good.parse::<PeerAddress>().unwrap().to_string(), good);
        }
        for bad in ["", "a", "a:", ":1", "a:0", "a:65536", "::1:4433", "[::1]", "a b:1", "[x]:1"] {
            assert!(bad.parse::<PeerAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_match_whole_paths() {
        let yes = [
            ("**", "a"),
            ("**", "a/b/c"),
            ("*", "a.img"),
            ("*.img", "a.img"),
            ("vm-?/*.qcow2", "vm-1/disk.qcow2"),
            ("**/*.img", "a.img"),
            ("**/*.img", "x/y/a.img"),
            ("prod/**", "prod/a/b"),
            ("a/**/b", "a/b"),
            ("a/**/b", "a/x/y/b"),
            ("é*", "éa"),
        ];
        let no = [
            ("*", "a/b"),
            ("*.img", "a.img.bak"),
            ("*.img", "x/a.img"),
            ("vm-?/x", "vm-12/x"),
            ("a/**/b", "a/xb"),
            ("prod/**", "production/a"),
            ("?", ""),
            ("a", "ab"),
        ];
        for (pattern, path) in yes {
            assert!(pattern.parse::<PathPattern>().unwrap().matches(path), "{pattern} {path}");
        }
        for (pattern, path) in no {
            assert!(!pattern.parse::<PathPattern>().unwrap().matches(path), "{pattern} {path}");
        }
        let nasty = PathPattern("*a".repeat(500));
        assert!(!nasty.matches(&format!("{}b", "a".repeat(4000))));
    }
}
