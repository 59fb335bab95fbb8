//! The newest version of each entity that was seen lately: by this, writers who break the rules show.

use ahash::{HashMap, RandomState};

/// How a version follows the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follows {
    /// By one, or nothing is known of the entity.
    Well,
    /// Some between them are missing.
    WithGap { last: i64 },
    /// It, or a newer one, was there already.
    Again { last: i64 },
}

/// An entity, by its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entity(u64);

/// Remembers at least the last `capacity` entities, in two generations: when the young one is full, it becomes the old
/// one. Entities are known by a hash of 64 bits; two of a million share one with a chance of one in ten million.
#[derive(Debug)]
pub struct Versions {
    young: HashMap<u64, i64>,
    old: HashMap<u64, i64>,
    capacity: usize,
    hasher: RandomState,
}

impl Versions {
    pub fn new(capacity: usize) -> Self {
        Self {
            young: HashMap::default(),
            old: HashMap::default(),
            capacity,
            hasher: RandomState::new(),
        }
    }

    /// What the other functions know an entity by.
    pub fn entity(&self, kind: &str, key: &str) -> Entity {
        Entity(self.hasher.hash_one((kind, key)))
    }

    /// How `version` of the entity follows what was seen of it.
    pub fn check(&self, Entity(key): Entity, version: i64) -> Follows {
        match self.young.get(&key).or_else(|| self.old.get(&key)) {
            None => Follows::Well,
            Some(last) if version == last + 1 => Follows::Well,
            Some(last) if version > *last => Follows::WithGap { last: *last },
            Some(last) => Follows::Again { last: *last },
        }
    }

    pub fn saw(&mut self, Entity(key): Entity, version: i64) {
        self.young.insert(key, version);
        if self.young.len() >= self.capacity {
            self.old = std::mem::take(&mut self.young);
        }
    }

    /// The next version of the entity may be any.
    pub fn forget(&mut self, Entity(key): Entity) {
        self.young.remove(&key);
        self.old.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_follow_by_one() {
        let mut versions = Versions::new(10);
        let k = versions.entity("order", "k");
        assert_eq!(versions.check(k, 7), Follows::Well, "nothing is known");
        versions.saw(k, 7);
        assert_eq!(versions.check(k, 8), Follows::Well);
        assert_eq!(versions.check(k, 9), Follows::WithGap { last: 7 });
        assert_eq!(versions.check(k, 7), Follows::Again { last: 7 });
        assert_eq!(
            versions.check(versions.entity("payment", "k"), 9),
            Follows::Well,
            "another entity"
        );
        versions.forget(k);
        assert_eq!(versions.check(k, 9), Follows::Well);
    }

    #[test]
    fn what_was_seen_lately_is_remembered_in_bounded_space() {
        let mut versions = Versions::new(10);
        for n in 0..1_000 {
            versions.saw(versions.entity("t", &n.to_string()), 1);
        }
        for n in 990..1_000 {
            assert_eq!(
                versions.check(versions.entity("t", &n.to_string()), 3),
                Follows::WithGap { last: 1 },
                "{n}"
            );
        }
        assert!(versions.young.len() + versions.old.len() <= 20);
    }
}
