//! The gRPC face: parses requests, calls the app, turns its errors into statuses.

use contracts::shop::inventory::v1 as proto;
use contracts::shop::inventory::v1::inventory_service_server::InventoryService;
use service::deadline::Deadline;
use service::requests::RequestKey;
use service::status::Domain;
use service::telemetry::chain;
use service::validate::Fields;
use tonic::{Code, Request, Response, Status};

use crate::app::{ChangeStock, CommandError, Inventory};
use crate::domain::ProductId;
use crate::domain::stock::{Command, MAX_AVAILABLE, Refusal};
use crate::store::StoreError;

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("inventory.shop");

/// The service over the app.
#[derive(Debug, Clone)]
pub struct InventoryGrpc {
    inventory: Inventory,
    max_deadline: std::time::Duration,
}

impl InventoryGrpc {
    /// `max_deadline` is for calls that bring none.
    pub fn new(inventory: Inventory, max_deadline: std::time::Duration) -> Self {
        Self {
            inventory,
            max_deadline,
        }
    }
}

#[tonic::async_trait]
impl InventoryService for InventoryGrpc {
    async fn set_stock(
        &self,
        request: Request<proto::SetStockRequest>,
    ) -> Result<Response<proto::SetStockResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = ChangeStock::try_from(request.into_inner())?;
        Ok(Response::new(self.inventory.set(deadline, command).await?))
    }

    async fn adjust_stock(
        &self,
        request: Request<proto::AdjustStockRequest>,
    ) -> Result<Response<proto::AdjustStockResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = ChangeStock::try_from(request.into_inner())?;
        Ok(Response::new(self.inventory.adjust(deadline, command).await?))
    }

    async fn get_stock(
        &self,
        request: Request<proto::GetStockRequest>,
    ) -> Result<Response<proto::GetStockResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let mut fields = Fields::new();
        let product_id = fields.uuid("product_id", &request.get_ref().product_id);
        let product_id = fields.finish(DOMAIN, product_id)?;
        let stock = self.inventory.get(deadline, ProductId(product_id)).await?;
        Ok(Response::new(proto::GetStockResponse {
            stock: Some((&stock).into()),
        }))
    }
}

impl TryFrom<proto::SetStockRequest> for ChangeStock {
    type Error = Status;

    fn try_from(request: proto::SetStockRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let product_id = fields.uuid("product_id", &request.product_id);
        let available = match request.available {
            available if (0..=MAX_AVAILABLE).contains(&available) => Some(available),
            _ => fields.reject("available", "must be 0 to 1,000,000,000,000"),
        };
        let expected_version = expected_version(&mut fields, request.expected_version);
        let all = request_id.zip(product_id).zip(available).zip(expected_version);
        let (((request_id, product_id), available), expected_version) = fields.finish(DOMAIN, all)?;
        let method = "shop.inventory.v1.InventoryService/SetStock";
        Ok(Self {
            request: RequestKey::new(product_id, method, request_id, &request),
            product_id: ProductId(product_id),
            command: Command::Set(available),
            expected_version,
        })
    }
}

impl TryFrom<proto::AdjustStockRequest> for ChangeStock {
    type Error = Status;

    fn try_from(request: proto::AdjustStockRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let product_id = fields.uuid("product_id", &request.product_id);
        let change = match request.change {
            0 => fields.reject("change", "must not be 0"),
            change => Some(change),
        };
        let expected_version = expected_version(&mut fields, request.expected_version);
        let all = request_id.zip(product_id).zip(change).zip(expected_version);
        let (((request_id, product_id), change), expected_version) = fields.finish(DOMAIN, all)?;
        let method = "shop.inventory.v1.InventoryService/AdjustStock";
        Ok(Self {
            request: RequestKey::new(product_id, method, request_id, &request),
            product_id: ProductId(product_id),
            command: Command::Adjust(change),
            expected_version,
        })
    }
}

/// `Some(None)` when it does not matter.
fn expected_version(fields: &mut Fields, version: Option<i64>) -> Option<Option<i64>> {
    match version {
        Some(version) if version < 0 => fields.reject("expected_version", "must not be negative"),
        version => Some(version),
    }
}

impl From<CommandError> for Status {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::VersionMismatch => {
                let message = "the stock is not at expected_version: read it again";
                DOMAIN.status(Code::Aborted, "VERSION_MISMATCH", message).build()
            }
            CommandError::Refused(refusal) => refused(refusal),
            CommandError::Request(error) => error.to_status(DOMAIN),
            CommandError::Store(StoreError::Database(error)) => error.to_status(DOMAIN),
            // The row was locked, so this takes two who make the product known; a repeat tells.
            CommandError::Store(StoreError::Conflict) => DOMAIN
                .status(
                    Code::Aborted,
                    "CONCURRENT_CHANGE",
                    "another command came first: try again",
                )
                .build(),
            CommandError::Store(error @ (StoreError::Broken { .. } | StoreError::Undecodable { .. })) => {
                tracing::error!(error = %chain(&error), "stock cannot be read");
                DOMAIN
                    .status(Code::Internal, "INTERNAL", "internal error")
                    .build()
            }
        }
    }
}

fn refused(refusal: Refusal) -> Status {
    let message = refusal.to_string();
    let reason = match refusal {
        Refusal::Unknown => {
            return DOMAIN
                .status(Code::NotFound, "PRODUCT_NOT_FOUND", message)
                .build();
        }
        Refusal::TooFew => "NOT_ENOUGH_STOCK",
        Refusal::TooMany => "TOO_MUCH_STOCK",
    };
    DOMAIN
        .status(Code::FailedPrecondition, reason, message.clone())
        .precondition("STOCK", "stock", &message)
        .build()
}
