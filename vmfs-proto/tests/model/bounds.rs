//! What is explored, written as text: `rrw+r fast=02 promote=1 writes=1 flushes=1 promotions=2` is two
//! data members, a witness, and a host with data that is no member yet; the disks of hosts 0 and 2
//! complete at once, on the others completion is a step of its own; `together=no`: packets that one
//! step sends on one connection arrive one by one; `apart=01`: hosts 0 and 1 cannot reach each other.

use stateright::{Model, Property};
use vmfs_common::policy::MemberRole;
use vmfs_common::weaken::{self, Weakness};
use vmfs_proto::testing::At;

use crate::world::{Budget, Setting, Step, World};

/// States that must be reached, else the bounds say nothing.
pub(crate) const REACH: [&str; 6] = [
    "a later owner's flush",
    "an adopted flush",
    "a fork kept",
    "handed over",
    "members changed",
    "a restart",
];

#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    setting: Setting,
    /// A rule that is broken on purpose.
    weakness: Option<Weakness>,
    reach: Vec<&'static str>,
}

impl Bounds {
    pub(crate) fn parse(text: &str, weakness: Option<Weakness>, reach: &[&'static str]) -> Self {
        let mut words = text.split_whitespace();
        let hosts = words.next().expect("hosts");
        let role = |c: char| if c == 'w' { MemberRole::Witness } else { MemberRole::Replica };
        let (members, _) = hosts.split_once('+').unwrap_or((hosts, ""));
        let mut this = Setting {
            roles: hosts.chars().filter(|c| *c != '+').map(role).collect(),
            members: members.len(),
            fast: Vec::new(),
            together: true,
            apart: Vec::new(),
            weak_links: Vec::new(),
            promote: Vec::new(),
            guests: Vec::new(),
            crash: Vec::new(),
            left: Budget::default(),
        };
        for word in words {
            let (name, value) = word.split_once('=').expect("name=value");
            let digits = || value.bytes().map(|b| At::from(b - b'0')).collect::<Vec<At>>();
            let number = || value.parse().expect("a small number");
            let left = &mut this.left;
            match name {
                "together" => this.together = value != "no",
                "fast" => this.fast = digits(),
                "apart" => this.apart.push((digits()[0], digits()[1])),
                "cut" => this.weak_links.push((digits()[0], digits()[1])),
                "guests" => this.guests = digits(),
                "crash" => this.crash = digits(),
                "promote" => this.promote = digits(),
                "writes" => left.writes = number(),
                "flushes" => left.flushes = number(),
                "promotions" => left.promotions = number(),
                "handovers" => left.handovers = number(),
                "changes" => left.changes = number(),
                "cuts" => left.cuts = number(),
                "crashes" => left.crashes = number(),
                "soon" => left.soon = number(),
                "long" => left.long = number(),
                other => panic!("no bound is called {other:?}"),
            }
        }
        Self { setting: this, weakness, reach: reach.to_vec() }
    }
}

impl Model for Bounds {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        weaken::set(self.weakness);
        vec![World::new(&self.setting)]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Step>) {
        state.steps(&self.setting, actions);
    }

    fn next_state(&self, state: &World, step: Step) -> Option<World> {
        weaken::set(self.weakness);
        let mut next = state.clone();
        next.step(step);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let reached: [fn(&Self, &World) -> bool; 6] = [
            |_, w| w.oracle.acknowledged.iter().any(|(by, _)| by.number > 1),
            |_, w| w.oracle.acknowledged.iter().any(|(by, head)| head.epoch < *by),
            |_, w| w.hosts.iter().any(|h| h.forked),
            |_, w| w.oracle.handed_over,
            |_, w| w.oracle.changed,
            |_, w| {
                let open = w.hosts[0].machine.as_ref().is_some_and(|m| m.is_open_owner());
                open && w.hosts[0].head().epoch.number > 1
            },
        ];
        let holds = Property::always("the promises hold", |_: &Self, w: &World| w.oracle.violation.is_none());
        let some = REACH.into_iter().zip(reached).filter(|(name, _)| self.reach.contains(name));
        some.map(|(name, f)| Property::sometimes(name, f)).chain([holds]).collect()
    }
}
