// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The import graph of `src`: no circle between files, no arrow that runs up the steps.
//!
//! A file imports another one by `use` or by a path that starts with `crate`, `self` or `super`.
//! Items under `#[cfg(test)]` and the text of macros do not count. A `mod.rs` and the files of its
//! folder are one room: what the room's own files import from each other is not looked at, except
//! that it has to be free of circles, too, once the `mod.rs` is left out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// The rooms by step. An arrow runs from a room to one further down.
const STEPS: [&[&str]; 9] = [
    &["cli"],
    &["session"],
    &["ring"],
    &["fs", "pmem"],
    // The seam: rings know it, and no device.
    &["device"],
    &["dax"],
    &["window"],
    &["persist", "passthrough"],
    &["sandbox"],
];

/// Arrows that run down and are forbidden all the same: the column "must not know".
const FORBIDDEN: [(&str, &str); 4] =
    [("ring", "fs"), ("ring", "pmem"), ("ring", "dax"), ("pmem", "passthrough")];

/// What any room may import, and what imports no room.
const SUPPORT: &str = "support";

/// File modules by name, such as `fs::dax::window`, each with the modules that it imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

struct Imports<'a> {
    module: Vec<String>,
    files: &'a BTreeSet<String>,
    found: BTreeSet<String>,
}

impl Imports<'_> {
    /// Takes `path`, as it stands in the source, for the file module that it leads to.
    fn add(&mut self, path: &[String]) {
        let mut at = match path[0].as_str() {
            "crate" | "vhost_user_dax" => Vec::new(),
            "self" => self.module.clone(),
            "super" => self.module[..self.module.len().saturating_sub(1)].to_vec(),
            _ => return,
        };
        for word in &path[1..] {
            if word == "super" {
                at.pop();
            } else {
                at.push(word.clone());
            }
        }
        while !at.is_empty() && !self.files.contains(&at.join("::")) {
            at.pop();
        }
        let target = at.join("::");
        if !target.is_empty() && target != self.module.join("::") {
            self.found.insert(target);
        }
    }

    fn add_tree(&mut self, before: &[String], tree: &UseTree) {
        let mut path = before.to_vec();
        match tree {
            UseTree::Path(step) => {
                path.push(step.ident.to_string());
                self.add_tree(&path, &step.tree);
            }
            UseTree::Name(name) => {
                if name.ident != "self" || path.is_empty() {
                    path.push(name.ident.to_string());
                }
                self.add(&path);
            }
            UseTree::Rename(name) => {
                path.push(name.ident.to_string());
                self.add(&path);
            }
            UseTree::Glob(_) => self.add(&path),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_tree(before, tree));
            }
        }
    }
}

/// Tells whether `attributes` leave the item out of all but tests and the model checker.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| {
                let words = list.tokens.to_string();
                words == "test" || words.starts_with("all (") || words == "loom"
            })
    })
}

impl<'ast> Visit<'ast> for Imports<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !is_for_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<_> = path.segments.iter().map(|word| word.ident.to_string()).collect();
        if words.len() > 1 {
            self.add(&words);
        }
        visit::visit_path(self, path);
    }
}

/// The file modules below `folder`, as (name, path of the file).
fn files_below(folder: &Path, module: &str, files: &mut BTreeMap<String, std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        let name = if module.is_empty() { stem.clone() } else { format!("{module}::{stem}") };
        if path.is_dir() {
            files_below(&path, &name, files);
        } else if stem == "mod" {
            files.insert(module.to_string(), path);
        } else if !name.ends_with("tests") && !["lib", "main"].contains(&name.as_str()) {
            files.insert(name, path);
        }
    }
}

fn graph() -> Graph {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = BTreeMap::new();
    files_below(&src, "", &mut files);
    let names: BTreeSet<_> = files.keys().cloned().collect();
    let imports = |(name, path): (&String, &std::path::PathBuf)| {
        let source = syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap();
        let module = name.split("::").map(String::from).collect();
        let mut imports = Imports { module, files: &names, found: BTreeSet::new() };
        imports.visit_file(&source);
        (name.clone(), imports.found)
    };
    files.iter().map(imports).collect()
}

fn room(module: &str) -> &str {
    module.split("::").next().unwrap()
}

/// Shows a way from `at` back to `to`, if there is one.
fn way_back(graph: &Graph, at: &str, to: &str, seen: &mut BTreeSet<String>) -> Option<Vec<String>> {
    for next in graph.get(at)? {
        if next == to {
            return Some(vec![at.to_string(), to.to_string()]);
        }
        if seen.insert(next.clone())
            && let Some(mut way) = way_back(graph, next, to, seen)
        {
            way.insert(0, at.to_string());
            return Some(way);
        }
    }
    None
}

fn circles(graph: &Graph) -> Vec<String> {
    let circle = |name: &String| way_back(graph, name, name, &mut BTreeSet::new());
    graph.keys().filter_map(circle).map(|way| way.join(" -> ")).collect()
}

/// Shows: no import circle between rooms, and none between the files of a room, its `mod.rs` left
/// out.
#[test]
fn there_is_no_circle() {
    let graph = graph();
    let mut rooms = Graph::new();
    let mut within = Graph::new();
    for (from, targets) in &graph {
        let others = targets.iter().filter(|to| room(to) != room(from));
        rooms.entry(room(from).into()).or_default().extend(others.map(|to| room(to).to_string()));
        // A folder's `mod.rs` declares its files and may be used by them: it has a name that the
        // names of the others begin with.
        let beside = |to: &&String| {
            room(to) == room(from)
                && !from.starts_with(&format!("{to}::"))
                && !to.starts_with(&format!("{from}::"))
        };
        within.entry(from.clone()).or_default().extend(targets.iter().filter(beside).cloned());
    }
    let arrows: usize = rooms.values().map(BTreeSet::len).sum();
    println!("{} files, {} rooms, {arrows} arrows between rooms", graph.len(), rooms.len());
    assert_eq!(circles(&rooms), Vec::<String>::new(), "circles between rooms");
    assert_eq!(circles(&within), Vec::<String>::new(), "circles within a room");
}

/// Shows: no arrow runs up the steps of ARCHITECTURE.md.
#[test]
fn no_arrow_runs_up() {
    let step = |name: &str| {
        let step = STEPS.iter().position(|rooms| rooms.contains(&name));
        step.unwrap_or_else(|| panic!("the room {name} has no step in STEPS"))
    };
    let mut up = Vec::new();
    for (from, targets) in &graph() {
        for to in targets.iter().filter(|to| room(to) != room(from)) {
            let (a, b) = (room(from), room(to));
            let runs_down = b == SUPPORT || (a != SUPPORT && step(a) < step(b));
            if !runs_down || FORBIDDEN.contains(&(a, b)) {
                up.push(format!("{from} -> {to}"));
            }
        }
    }
    assert_eq!(up, Vec::<String>::new(), "arrows that run up, or sideways");
}
