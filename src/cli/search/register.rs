//! `--register URL`: what was named becomes one that can be asked for on a server that runs.

use super::SearchArgs;
use crate::artifact::CatalogLine;
use crate::cli::Failure;
use crate::cli::open::OpenedModel;
use crate::server::RunningServer;
use crate::supernet::MAXIMAL;
use std::collections::BTreeMap;
use tokio::runtime::Runtime;

/// A server to register at.
pub(super) struct Registrar {
    server: RunningServer,
    runtime: Runtime,
    url: String,
}

impl Registrar {
    /// The one that the arguments name, if they name one.
    ///
    /// # Errors
    /// Nothing to register, no key.
    pub(super) fn new(args: &SearchArgs) -> Result<Option<Self>, Failure> {
        let Some(url) = &args.register else { return Ok(None) };
        if args.name.is_empty() {
            return Err("--register: there is nothing to register; name something with --name".into());
        }
        let key = args.admin_key.iter().find(|k| !k.is_empty());
        let key = key.ok_or("--register: give the server's admin key as LONAS_ADMIN_KEY or --admin-key")?;
        let server = RunningServer::new(url, key).map_err(|e| format!("--register {e}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Some(Self { server, runtime, url: url.clone() }))
    }

    /// Whether that server takes sub-networks of this super-network, before an hour goes by: it is asked for the maximal one,
    /// which it has, and which means nothing new only in the same search space.
    pub(super) fn check(&self, model: &OpenedModel) -> Result<(), Failure> {
        let maximal = model.catalog.get(MAXIMAL).ok_or("no maximal sub-network")?;
        let bare = CatalogLine {
            scores: BTreeMap::new(),
            evaluations: Vec::new(),
            latency: BTreeMap::new(),
            ..CatalogLine::of(maximal)
        };
        self.put(model, &bare)
    }

    /// Registers what the catalog has under these names.
    pub(super) fn register<'a>(
        &self,
        model: &OpenedModel,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<(), Failure> {
        for name in names {
            let entry = model.catalog.get(name).ok_or_else(|| format!("the catalog has no `{name}`"))?;
            self.put(model, &CatalogLine::of(entry))?;
            tracing::info!("{} serves {}:{name} now", self.url, model.folder.name);
        }
        Ok(())
    }

    fn put(&self, model: &OpenedModel, line: &CatalogLine) -> Result<(), Failure> {
        let done = self.runtime.block_on(self.server.register(&model.folder.name, line));
        Ok(done.map_err(|e| format!("--register: `{}`: {e}", line.name))?)
    }
}
