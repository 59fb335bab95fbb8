//! Jars from Maven Central, or the mirror that Maven is set to.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths;

/// Fetches `dependencies` (group, artifact, version), with all that they need to run, to `jars`, unless that is there.
/// The parent folder of `jars` is used on the way.
pub(crate) fn fetch(what: &str, jars: &Path, dependencies: &[(&str, &str, &str)]) -> Result<()> {
    let folder = jars
        .parent()
        .context("the jars have no parent folder")?
        .to_owned();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Several processes may want them at once.
    let lock = std::fs::File::create(folder.join("lock"))?;
    lock.lock()
        .with_context(|| format!("cannot lock the folder of {what}'s jars"))?;
    if jars.is_dir() {
        return Ok(());
    }
    let maven = paths::on_path("mvn").context("Maven is not installed (apt-get install maven)")?;
    let pom = folder.join("pom.xml");
    std::fs::write(&pom, pom_text(dependencies))?;
    let incomplete = folder.join("jars.incomplete");
    let output = Command::new(maven)
        .args(["-B", "-q", "-ntp", "-f"])
        .arg(&pom)
        .args(["dependency:copy-dependencies", "-DincludeScope=runtime"])
        .arg(format!("-DoutputDirectory={}", incomplete.display()))
        .output()
        .context("Maven did not start")?;
    if !output.status.success() {
        bail!(
            "Maven could not fetch {what}'s jars (is Maven Central, or a mirror in ~/.m2/settings.xml, reachable?):\n{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    std::fs::rename(&incomplete, jars)?;
    Ok(())
}

fn pom_text(dependencies: &[(&str, &str, &str)]) -> String {
    let dependencies: String = dependencies
        .iter()
        .map(|(group, artifact, version)| {
            format!(
                "<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId>\
                 <version>{version}</version></dependency>\n"
            )
        })
        .collect();
    format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\">\n<modelVersion>4.0.0</modelVersion>\n\
         <groupId>local</groupId><artifactId>jars</artifactId><version>1</version>\n\
         <dependencies>\n{dependencies}</dependencies>\n</project>\n"
    )
}
