// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The output of a case in the guest.

/// One extent of a file: its offset in the file, its offset in the pmem device and so in the
/// backing file, and its length.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    pub logical: u64,
    pub physical: u64,
    pub len_bytes: u64,
}

#[derive(Debug)]
pub struct CaseReport {
    pub lines: Vec<String>,
}

impl CaseReport {
    /// The value of the first `key=value` line of that key.
    pub fn get(&self, key: &str) -> &str {
        self.values(key).first().copied().unwrap_or_else(|| panic!("no {key}= in {self:#?}"))
    }

    pub fn number(&self, key: &str) -> u64 {
        self.get(key).parse().unwrap_or_else(|error| panic!("{key} in {self:#?}: {error}"))
    }

    pub fn values(&self, key: &str) -> Vec<&str> {
        self.lines
            .iter()
            .filter_map(|line| line.split_once('='))
            .filter(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .collect()
    }

    pub fn extents(&self) -> Vec<Extent> {
        self.values("extent")
            .into_iter()
            .map(|value| {
                let numbers: Vec<u64> = value.split(',').map(|n| n.parse().unwrap()).collect();
                assert_eq!(numbers.len(), 3, "extent={value}");
                Extent { logical: numbers[0], physical: numbers[1], len_bytes: numbers[2] }
            })
            .collect()
    }
}
