//! The rules of the layers, held over `cargo metadata` and the sources; see ARCHITECTURE.md. Each rule is a function, and
//! is proved by a small workspace that breaks it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{DependencyKind, MetadataCommand, TargetKind};

/// For people, not for production: they may be what processes may not.
const TOOLS: [&str; 4] = ["bench", "demo", "dev-cli", "tests"];
/// Names that must be there at the top.
const TOP: [&str; 18] = [
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "Cargo.toml",
    "README.md",
    "analytics-svc",
    "crates",
    "deploy",
    "dev",
    "inventory-svc",
    "migrations",
    "notification-svc",
    "order-query-svc",
    "order-svc",
    "outbox-relay",
    "payment-sandbox",
    "payment-svc",
    "proto",
    "user-svc",
];
/// What a domain must not name: runtimes, transports, databases, generated types, clocks, chance and the outside world.
const IMPURE: [&str; 24] = [
    "async",
    "contracts",
    "diesel",
    "diesel_async",
    "Instant",
    "Local",
    "now_v7",
    "new_v4",
    "prost",
    "prost_types",
    "rand",
    "rdkafka",
    "service",
    "std::env",
    "std::fs",
    "std::io",
    "std::net",
    "std::process",
    "std::thread",
    "SystemTime",
    "tokio",
    "tokio_postgres",
    "tonic",
    "Utc::now",
];
/// Inside a service, each may use only those behind it.
const LAYERS: [&str; 4] = ["grpc", "app", "store", "domain"];
/// Crates that reach outside of the process.
const IO_CRATES: [&str; 12] = [
    "axum",
    "diesel",
    "diesel-async",
    "diesel_migrations",
    "hyper",
    "opentelemetry-otlp",
    "rdkafka",
    "reqwest",
    "tokio",
    "tokio-postgres",
    "tonic",
    "tower",
];

#[derive(Debug, Clone, Default)]
struct Crate {
    /// From the root of the workspace: `order-svc`, `crates/outbox`.
    folder: String,
    is_binary: bool,
    /// What production code depends on, builds included.
    dependencies: BTreeSet<String>,
    /// By path below `src`, without comments, literals and tests.
    sources: BTreeMap<String, String>,
}

impl Crate {
    fn is_process(&self) -> bool {
        !self.folder.contains('/') && !TOOLS.contains(&self.folder.as_str())
    }

    fn is_library(&self) -> bool {
        self.folder.starts_with("crates/")
    }
}

type Workspace = BTreeMap<String, Crate>;

/// All rules.
fn violations(workspace: &Workspace) -> Vec<String> {
    [
        folders_are_named_like_their_crates,
        nothing_depends_on_a_process,
        libraries_stay_apart,
        domains_are_pure,
        only_stores_name_the_schema,
        layers_go_one_way,
        modules_are_acyclic,
    ]
    .iter()
    .flat_map(|rule| rule(workspace))
    .collect()
}

fn folders_are_named_like_their_crates(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in workspace {
        if member.folder.rsplit('/').next() != Some(name) {
            found.push(format!("the crate {name} is in the folder {}", member.folder));
        }
        if member.is_process() && !member.is_binary {
            found.push(format!(
                "{name} is at the top and no process: libraries go to crates/"
            ));
        }
        if member.is_library() && member.is_binary {
            found.push(format!("{name} is a process: processes go to the top"));
        }
    }
    found
}

fn nothing_depends_on_a_process(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in workspace {
        for dependency in &member.dependencies {
            // The tests switch their failpoints on.
            if name == "tests"
                && ["notification-svc", "payment-svc", "outbox-relay"].contains(&dependency.as_str())
            {
                continue;
            }
            if workspace
                .get(dependency)
                .is_some_and(|other| other.is_process() || TOOLS.contains(&other.folder.as_str()))
            {
                found.push(format!("{name} depends on the process {dependency}"));
            }
        }
    }
    found
}

fn libraries_stay_apart(workspace: &Workspace) -> Vec<String> {
    let database = ["diesel", "diesel-async", "diesel_migrations", "tokio-postgres"];
    let mut rules: Vec<(&str, &[&str])> = vec![
        ("contracts", &database),
        ("contracts", &["rdkafka"]),
        ("outbox", &["rdkafka", "envelope", "consumer", "service"]),
        ("event-store", &["rdkafka", "consumer", "service"]),
        ("envelope", &IO_CRATES),
        ("money", &IO_CRATES),
        ("card-scan", &IO_CRATES),
        ("consumer", &["service", "tonic", "axum"]),
        ("service", &["rdkafka", "contracts", "outbox", "event-store"]),
    ];
    // Starts what is real for tests and ./dev; nothing of it goes into production.
    for (name, member) in workspace {
        if member.is_process() || (member.is_library() && name != "local-stack") {
            rules.push((name, &["local-stack"]));
        }
    }
    let mut found = Vec::new();
    for (name, forbidden) in rules {
        let reached = reached(workspace, name);
        for dependency in forbidden
            .iter()
            .filter(|dependency| reached.contains(**dependency))
        {
            found.push(format!("{name} depends on {dependency}"));
        }
    }
    found
}

/// What a crate depends on, through the workspace's own crates.
fn reached(workspace: &Workspace, name: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut left = vec![name.to_owned()];
    while let Some(name) = left.pop() {
        for dependency in workspace
            .get(&name)
            .iter()
            .flat_map(|member| &member.dependencies)
        {
            if reached.insert(dependency.clone()) {
                left.push(dependency.clone());
            }
        }
    }
    reached
}

fn services(workspace: &Workspace) -> impl Iterator<Item = (&String, &Crate)> {
    workspace
        .iter()
        .filter(|(name, member)| member.is_process() && name.ends_with("-svc"))
}

fn domains_are_pure(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in services(workspace) {
        let mut files = 0;
        for (path, source) in member.sources.iter().filter(|(path, _)| module(path) == "domain") {
            files += 1;
            for word in IMPURE.iter().filter(|word| names(source, word)) {
                found.push(format!("{name}/src/{path} names {word}"));
            }
            for other in uses(source).difference(&BTreeSet::from(["domain".to_owned()])) {
                found.push(format!("{name}/src/{path} uses crate::{other}"));
            }
        }
        if files == 0 {
            found.push(format!("{name} has no domain"));
        }
    }
    found
}

fn only_stores_name_the_schema(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in services(workspace) {
        for (path, source) in &member.sources {
            let named = ["table!", "crate::schema", "store::schema", "schema::"]
                .into_iter()
                .filter(|word| names(source, word) && !names(source, &format!("event_store::{word}")));
            if !["store", "schema"].contains(&module(path)) {
                found.extend(named.map(|word| format!("{name}/src/{path} names the schema: {word}")));
            }
        }
    }
    found
}

fn layers_go_one_way(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in services(workspace) {
        for (path, source) in &member.sources {
            let Some(layer) = LAYERS.iter().position(|layer| *layer == module(path)) else {
                continue;
            };
            for other in uses(source) {
                if LAYERS[..layer].contains(&other.as_str()) {
                    found.push(format!(
                        "{name}/src/{path} uses crate::{other}, which is above it"
                    ));
                }
            }
        }
    }
    found
}

fn modules_are_acyclic(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for (name, member) in workspace.iter().filter(|(_, member)| member.is_process()) {
        let mut uses_of: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (path, source) in &member.sources {
            uses_of.entry(module(path)).or_default().extend(uses(source));
        }
        // The roots hold everything together, and own what has no module.
        uses_of.retain(|module, _| !["main", "lib"].contains(module));
        for module in uses_of.keys() {
            let mut reached: BTreeSet<&str> = BTreeSet::new();
            let mut left: Vec<&str> = vec![module];
            while let Some(at) = left.pop() {
                for next in uses_of.get(at).into_iter().flatten().filter(|next| *next != at) {
                    if reached.insert(next) {
                        left.push(next);
                    }
                }
            }
            if reached.contains(module) {
                found.push(format!(
                    "in {name}, the module {module} uses itself through others"
                ));
            }
        }
    }
    found
}

/// The module at the top of the crate to which a file belongs.
fn module(path: &str) -> &str {
    let first = path.split('/').next().unwrap_or(path);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// The modules that a source names as `crate::…`; also those in braces behind it.
fn uses(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (position, _) in source.match_indices("crate::") {
        let word_before = source[..position].chars().next_back();
        if word_before.is_some_and(is_word) {
            continue;
        }
        let rest = &source[position + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.extend(first_word(rest));
            continue;
        };
        let mut depth = 1;
        let mut begins = true;
        for (at, character) in list.char_indices() {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => begins = true,
                character if is_word(character) && begins => {
                    found.extend(first_word(&list[at..]));
                    begins = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    // Types and functions of the root are no modules.
    found.retain(|name| name.starts_with(|first: char| first.is_ascii_lowercase()));
    found
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.chars().take_while(|character| is_word(*character)).collect();
    (!word.is_empty()).then_some(word)
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether a source has `word` as a whole word, not as a part of another.
fn names(source: &str, word: &str) -> bool {
    source.match_indices(word).any(|(position, _)| {
        let before = source[..position].chars().next_back();
        let after = source[position + word.len()..].chars().next();
        let ends_open = word.ends_with(|last: char| !is_word(last));
        !before.is_some_and(is_word) && (ends_open || !after.is_some_and(is_word))
    })
}

/// A source without comments, contents of strings, and what is compiled for tests only.
fn code(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(character) = rest.chars().next() {
        let raw = rest.starts_with("r\"") || rest.starts_with("r#");
        if rest.starts_with("//") {
            rest = rest.find('\n').map_or("", |end| &rest[end..]);
        } else if rest.starts_with("/*") {
            rest = rest.find("*/").map_or("", |end| &rest[end + 2..]);
        } else if raw && !code.ends_with(is_word) && raw_string(rest).is_some() {
            rest = raw_string(rest).unwrap_or_default();
            code.push_str("\"\"");
        } else if character == '"' {
            rest = string(rest);
            code.push_str("\"\"");
        } else if rest.starts_with("'\"'") || rest.starts_with("'{'") || rest.starts_with("'}'") {
            rest = &rest[3..];
            code.push_str("' '");
        } else {
            code.push(character);
            rest = &rest[character.len_utf8()..];
        }
    }
    without_tests(&code)
}

/// What follows a string that begins here.
fn string(text: &str) -> &str {
    let mut escaped = false;
    for (position, character) in text.char_indices().skip(1) {
        match character {
            '"' if !escaped => return &text[position + 1..],
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    ""
}

/// What follows a raw string that begins here, if one does.
fn raw_string(text: &str) -> Option<&str> {
    let hashes = text[1..]
        .chars()
        .take_while(|character| *character == '#')
        .count();
    let body = text[1 + hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&end).map_or("", |at| &body[at + end.len()..]))
}

fn without_tests(code: &str) -> String {
    let Some((before, item)) = code.split_once("#[cfg(test)]") else {
        return code.to_owned();
    };
    // The item ends with its block, or with a semicolon before any.
    let mut depth = 0;
    for (position, character) in item.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 && matches!(character, '}' | ';') {
            return before.to_owned() + &without_tests(&item[position + 1..]);
        }
    }
    before.to_owned()
}

/// The workspace as it is.
fn real() -> Workspace {
    let metadata = MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata answers");
    let root = metadata.workspace_root.as_std_path();
    metadata
        .packages
        .iter()
        .map(|package| {
            let folder = package.manifest_path.parent().expect("a folder").as_std_path();
            let dependencies = package
                .dependencies
                .iter()
                .filter(|dependency| dependency.kind != DependencyKind::Development)
                .map(|dependency| dependency.name.clone())
                .collect();
            let is_binary = package
                .targets
                .iter()
                .any(|target| target.kind.contains(&TargetKind::Bin));
            let mut sources = BTreeMap::new();
            read_sources(&folder.join("src"), "", &mut sources);
            let member = Crate {
                folder: folder
                    .strip_prefix(root)
                    .expect("below the root")
                    .to_string_lossy()
                    .into_owned(),
                is_binary,
                dependencies,
                sources,
            };
            (package.name.to_string(), member)
        })
        .collect()
}

fn read_sources(folder: &Path, prefix: &str, sources: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(folder).expect("sources") {
        let path = entry.expect("an entry").path();
        let name = format!("{prefix}{}", path.file_name().expect("a name").to_string_lossy());
        if path.is_dir() {
            read_sources(&path, &format!("{name}/"), sources);
        } else if name.ends_with(".rs") && path.file_stem().is_some_and(|stem| stem != "tests") {
            sources.insert(name, code(&std::fs::read_to_string(&path).expect("text")));
        }
    }
}

#[test]
fn the_workspace_keeps_the_rules() {
    let workspace = real();
    for name in ["order-svc", "order-query-svc", "outbox-relay"] {
        assert!(workspace[name].is_process(), "{name} is no process");
    }
    tests::assert_sound(&violations(&workspace));
}

#[test]
fn the_top_has_what_it_must_have() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the root");
    for name in TOP {
        assert!(root.join(name).exists(), "{name} is missing");
    }
    let workspace = real();
    for entry in std::fs::read_dir(root).expect("the root") {
        let path = entry.expect("an entry").path();
        if path.join("Cargo.toml").exists() {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            assert!(
                workspace.get(&name).is_some_and(|member| member.folder == name),
                "{name}/ is no crate of the workspace by that name"
            );
        }
    }
}

/// A workspace in which all is well.
fn sound() -> Workspace {
    let mut workspace = Workspace::new();
    let mut add = |folder: &str, is_binary: bool, dependencies: &[&str], sources: &[(&str, &str)]| {
        let member = Crate {
            folder: folder.to_owned(),
            is_binary,
            dependencies: dependencies.iter().map(ToString::to_string).collect(),
            sources: sources
                .iter()
                .map(|(path, source)| ((*path).to_owned(), code(source)))
                .collect(),
        };
        let name = folder.rsplit('/').next().expect("a name").to_owned();
        workspace.insert(name, member);
    };
    add("crates/contracts", false, &["prost", "tonic"], &[]);
    add("crates/envelope", false, &["uuid"], &[]);
    add("crates/outbox", false, &["diesel"], &[]);
    add("crates/event-store", false, &["outbox"], &[]);
    add("crates/consumer", false, &["rdkafka", "diesel"], &[]);
    add("crates/service", false, &["tokio"], &[]);
    add("crates/local-stack", false, &["tokio"], &[]);
    add("outbox-relay", true, &["service", "rdkafka", "envelope"], &[]);
    add("tests", false, &["local-stack"], &[]);
    add(
        "a-svc",
        true,
        &["service", "outbox", "contracts"],
        &[
            ("main.rs", "use crate::grpc; use crate::app; mod store;"),
            (
                "grpc.rs",
                "use crate::app::App; use crate::{domain::{Order, store_of}, wire};",
            ),
            ("wire.rs", "use crate::domain; use crate::Root;"),
            ("app.rs", "use crate::{domain, store}; use diesel_async::X;"),
            (
                "store.rs",
                "diesel::table! { a (b) { } } use crate::domain::Order;",
            ),
            (
                "domain.rs",
                "//! No tokio here.\nmod order; use order::Order; const DIESEL: &str = \"tokio\";\n\
                 #[cfg(test)]\nmod tests { use tokio::time::Instant; fn f() { } }\npub fn g() {}",
            ),
            ("domain/order.rs", "use chrono::{DateTime, Utc}; use super::Item;"),
        ],
    );
    workspace
}

/// Puts a change into the sound workspace and expects a rule to notice it.
#[track_caller]
fn notices(part: &str, change: impl FnOnce(&mut Workspace)) {
    let mut workspace = sound();
    change(&mut workspace);
    let found = violations(&workspace);
    assert!(
        found.iter().any(|violation| violation.contains(part)),
        "{part:?} is not among {found:?}"
    );
}

fn depend(workspace: &mut Workspace, name: &str, on: &str) {
    let member = workspace.get_mut(name).expect("there");
    member.dependencies.insert(on.to_owned());
}

fn source(workspace: &mut Workspace, path: &str, text: &str) {
    let member = workspace.get_mut("a-svc").expect("there");
    member.sources.insert(path.to_owned(), code(text));
}

#[test]
fn a_sound_workspace_has_no_violations() {
    assert_eq!(violations(&sound()), Vec::<String>::new());
}

#[test]
fn misplaced_crates_are_noticed() {
    notices("the crate outbox is in the folder crates/box", |w| {
        w.get_mut("outbox").expect("there").folder = "crates/box".to_owned();
    });
    notices("outbox is at the top and no process", |w| {
        w.get_mut("outbox").expect("there").folder = "outbox".to_owned();
    });
    notices("outbox is a process", |w| {
        w.get_mut("outbox").expect("there").is_binary = true;
    });
}

#[test]
fn dependencies_on_processes_are_noticed() {
    notices("outbox-relay depends on the process a-svc", |w| {
        depend(w, "outbox-relay", "a-svc");
    });
    notices("service depends on the process a-svc", |w| {
        depend(w, "service", "a-svc")
    });
    notices("a-svc depends on the process tests", |w| {
        depend(w, "a-svc", "tests")
    });
}

#[test]
fn libraries_that_know_too_much_are_noticed() {
    for (name, on) in [
        ("contracts", "diesel"),
        ("outbox", "rdkafka"),
        ("envelope", "tokio"),
        ("consumer", "service"),
        ("service", "rdkafka"),
        ("a-svc", "local-stack"),
        ("service", "local-stack"),
    ] {
        notices(&format!("{name} depends on {on}"), |w| depend(w, name, on));
    }
    notices("outbox depends on rdkafka", |w| {
        // Through another crate.
        depend(w, "outbox", "consumer");
    });
}

#[test]
fn impure_domains_are_noticed() {
    for (text, word) in [
        ("use tokio::time;", "tokio"),
        ("fn f() { tonic::Status::ok(\"\") }", "tonic"),
        ("use diesel::prelude::*;", "diesel"),
        ("use rdkafka::Message;", "rdkafka"),
        ("use contracts::shop::order::v1;", "contracts"),
        ("fn f() { chrono::Utc::now() }", "Utc::now"),
        ("fn f() { std::time::SystemTime::now() }", "SystemTime"),
        ("fn f() { Uuid::now_v7() }", "now_v7"),
        ("async fn f() {}", "async"),
    ] {
        notices(&format!("a-svc/src/domain/order.rs names {word}"), |w| {
            source(w, "domain/order.rs", text);
        });
    }
    notices("a-svc/src/domain.rs uses crate::store", |w| {
        source(w, "domain.rs", "use crate::store;");
    });
    notices("a-svc has no domain", |w| {
        let member = w.get_mut("a-svc").expect("there");
        member.sources.retain(|path, _| module(path) != "domain");
    });
}

#[test]
fn schemas_outside_of_stores_are_noticed() {
    for text in [
        "use crate::store::schema::orders;",
        "diesel::table! { x (y) { } }",
        "use crate::schema;",
    ] {
        notices("a-svc/src/app.rs names the schema", |w| source(w, "app.rs", text));
    }
}

#[test]
fn layers_that_go_up_are_noticed() {
    for (path, text, part) in [
        ("app.rs", "use crate::grpc::Status;", "app.rs uses crate::grpc"),
        (
            "store.rs",
            "use crate::{app, domain};",
            "store.rs uses crate::app",
        ),
        (
            "domain.rs",
            "fn f() { crate::app::f() }",
            "domain.rs uses crate::app",
        ),
    ] {
        notices(part, |w| source(w, path, text));
    }
}

#[test]
fn cycles_of_modules_are_noticed() {
    notices("in a-svc, the module wire uses itself", |w| {
        source(w, "wire.rs", "use crate::{domain, other};");
        source(w, "other.rs", "fn f() { crate::wire::g() }");
    });
}

#[test]
fn comments_strings_and_tests_are_no_code() {
    let source = "a // b\n/* c */ d \"e \\\" f\" r#\"g \" h\"# '\"' i\n#[cfg(test)]\nmod tests;\nj\n#[cfg(test)] mod t { k { } } l";
    let code = code(source);
    for (word, there) in [
        ("a", true),
        ("b", false),
        ("c", false),
        ("d", true),
        ("e", false),
        ("f", false),
        ("g", false),
        ("h", false),
        ("i", true),
        ("tests", false),
        ("j", true),
        ("k", false),
        ("l", true),
    ] {
        assert_eq!(names(&code, word), there, "{word} in {code:?}");
    }
}
