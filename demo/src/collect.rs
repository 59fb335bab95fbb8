//! `demo collect`: takes the spans that processes export and keeps them as they came, so that they can be scanned.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use prost::Message as _;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Of one export.
const LARGEST: usize = 64 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the spans go, a file per service
    #[arg(long)]
    folder: PathBuf,
    /// Where to say at which URL it listens
    #[arg(long)]
    endpoint_file: PathBuf,
}

/// Runs until it is killed.
pub(crate) async fn run(options: Options) -> Result<()> {
    std::fs::create_dir_all(&options.folder)
        .with_context(|| format!("cannot make {}", options.folder.display()))?;
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).context("cannot listen")?;
    let url = format!("http://{}", incoming.local_addr()?);
    let keeper = Keeper {
        folder: options.folder,
        files: Mutex::default(),
    };
    // Renamed into place, so that a reader sees all of it or nothing.
    let draft = options.endpoint_file.with_extension("draft");
    std::fs::write(&draft, url)?;
    std::fs::rename(draft, options.endpoint_file)?;
    let service = TraceServiceServer::new(keeper).max_decoding_message_size(LARGEST);
    Ok(Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming)
        .await?)
}

struct Keeper {
    folder: PathBuf,
    files: Mutex<HashMap<String, File>>,
}

impl Keeper {
    fn keep(&self, spans: &ResourceSpans) -> std::io::Result<()> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let service = service_of(spans);
        let file = match files.entry(service) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let path = self.folder.join(format!("{}.otlp", entry.key()));
                let file = OpenOptions::new().create(true).append(true).open(path)?;
                entry.insert(file)
            }
        };
        file.write_all(&spans.encode_length_delimited_to_vec())
    }
}

/// The service's name, as far as it can be the name of a file.
fn service_of(spans: &ResourceSpans) -> String {
    let attributes = spans.resource.iter().flat_map(|resource| &resource.attributes);
    let named = attributes.filter(|attribute| attribute.key == "service.name");
    let mut names = named.filter_map(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(name) => Some(name.as_str()),
        _ => None,
    });
    let name = names.next().unwrap_or("unknown").chars();
    name.filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-')
        .collect()
}

#[tonic::async_trait]
impl TraceService for Keeper {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for spans in &request.get_ref().resource_spans {
            self.keep(spans)
                .map_err(|error| Status::internal(format!("the spans cannot be written: {error}")))?;
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
