//! The gRPC face: parses requests, calls the app, turns its errors into statuses.

use contracts::shop::user::v1 as proto;
use contracts::shop::user::v1::user_service_server::UserService;
use service::deadline::Deadline;
use service::requests::RequestKey;
use service::status::Domain;
use service::telemetry::chain;
use service::validate::Fields;
use tonic::{Code, Request, Response, Status};

use crate::app::{CommandError, CreateUser, UpdateUser, Users};
use crate::domain::{Details, Email, MAX_NAME, Name, Refusal, Update, UserId};
use crate::store::StoreError;

/// Whose reasons the errors give.
pub const DOMAIN: Domain = Domain("user.shop");

/// Whose the request ids of CreateUser are: there is no user yet who could have them.
const ANYBODY: &str = "anybody";

/// The service over the app.
#[derive(Debug, Clone)]
pub struct UserGrpc {
    users: Users,
    max_deadline: std::time::Duration,
}

impl UserGrpc {
    /// `max_deadline` is for calls that bring none.
    pub fn new(users: Users, max_deadline: std::time::Duration) -> Self {
        Self { users, max_deadline }
    }
}

#[tonic::async_trait]
impl UserService for UserGrpc {
    async fn create_user(
        &self,
        request: Request<proto::CreateUserRequest>,
    ) -> Result<Response<proto::CreateUserResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = CreateUser::try_from(request.into_inner())?;
        Ok(Response::new(self.users.create(deadline, command).await?))
    }

    async fn update_user(
        &self,
        request: Request<proto::UpdateUserRequest>,
    ) -> Result<Response<proto::UpdateUserResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let command = UpdateUser::try_from(request.into_inner())?;
        Ok(Response::new(self.users.update(deadline, command).await?))
    }

    async fn get_user(
        &self,
        request: Request<proto::GetUserRequest>,
    ) -> Result<Response<proto::GetUserResponse>, Status> {
        let deadline = Deadline::of(&request, self.max_deadline);
        let mut fields = Fields::new();
        let user_id = fields.uuid("user_id", &request.get_ref().user_id);
        let user_id = fields.finish(DOMAIN, user_id)?;
        let user = self.users.get(deadline, UserId(user_id)).await?;
        Ok(Response::new(proto::GetUserResponse {
            user: Some((&user).into()),
        }))
    }
}

impl TryFrom<proto::CreateUserRequest> for CreateUser {
    type Error = Status;

    fn try_from(request: proto::CreateUserRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let email = email(&mut fields, &request.email);
        let first_name = name(&mut fields, "first_name", &request.first_name);
        let last_name = name(&mut fields, "last_name", &request.last_name);
        let all = request_id.zip(email).zip(first_name.zip(last_name));
        let ((request_id, email), (first_name, last_name)) = fields.finish(DOMAIN, all)?;
        let method = "shop.user.v1.UserService/CreateUser";
        Ok(Self {
            request: RequestKey::new(ANYBODY, method, request_id, &request),
            details: Details {
                email,
                first_name,
                last_name,
            },
        })
    }
}

impl TryFrom<proto::UpdateUserRequest> for UpdateUser {
    type Error = Status;

    fn try_from(request: proto::UpdateUserRequest) -> Result<Self, Status> {
        let mut fields = Fields::new();
        let request_id = fields.uuid("request_id", &request.request_id);
        let user_id = fields.uuid("user_id", &request.user_id);
        // What is wrong is noted, and makes the whole request so.
        let update = Update {
            email: request.email.as_deref().and_then(|text| email(&mut fields, text)),
            first_name: request
                .first_name
                .as_deref()
                .and_then(|text| name(&mut fields, "first_name", text)),
            last_name: request
                .last_name
                .as_deref()
                .and_then(|text| name(&mut fields, "last_name", text)),
        };
        let expected_version = match request.expected_version {
            0 => Some(None),
            version if version > 0 => Some(Some(version)),
            _ => fields.reject("expected_version", "must not be negative"),
        };
        let all = request_id.zip(user_id).zip(expected_version);
        let ((request_id, user_id), expected_version) = fields.finish(DOMAIN, all)?;
        let method = "shop.user.v1.UserService/UpdateUser";
        Ok(Self {
            request: RequestKey::new(user_id, method, request_id, &request),
            user_id: UserId(user_id),
            update,
            expected_version,
        })
    }
}

fn email(fields: &mut Fields, text: &str) -> Option<Email> {
    if text.is_empty() {
        return fields.reject("email", "must be an e-mail address");
    }
    let text = fields.optional_email("email", text)?;
    Email::parse(&text).or_else(|| fields.reject("email", "must be an e-mail address"))
}

fn name(fields: &mut Fields, field: &'static str, text: &str) -> Option<Name> {
    let text = fields.text(field, text, MAX_NAME)?;
    Name::parse(&text).or_else(|| fields.reject(field, "must be on one line and not blank"))
}

impl From<CommandError> for Status {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::NotFound | CommandError::Refused(Refusal::Unknown) => DOMAIN
                .status(Code::NotFound, "USER_NOT_FOUND", "there is no such user")
                .build(),
            CommandError::VersionMismatch => {
                let message = "the user is not at expected_version: read it again";
                DOMAIN.status(Code::Aborted, "VERSION_MISMATCH", message).build()
            }
            CommandError::Refused(refusal @ (Refusal::Exists | Refusal::Inconsistent(_))) => {
                tracing::error!(error = %chain(&refusal), "a command met a state that should not exist");
                internal()
            }
            CommandError::Request(error) => error.to_status(DOMAIN),
            CommandError::Store(StoreError::EmailTaken) => {
                let message = "another user has this address";
                DOMAIN.status(Code::AlreadyExists, "EMAIL_TAKEN", message).build()
            }
            CommandError::Store(StoreError::Database(error)) => error.to_status(DOMAIN),
            // The row was locked, so this takes two users of one id; a repeat tells.
            CommandError::Store(StoreError::Conflict(_)) => DOMAIN
                .status(
                    Code::Aborted,
                    "CONCURRENT_CHANGE",
                    "another command came first: try again",
                )
                .build(),
            CommandError::Store(error @ (StoreError::Broken { .. } | StoreError::Undecodable { .. })) => {
                tracing::error!(error = %chain(&error), "a user cannot be read");
                internal()
            }
        }
    }
}

fn internal() -> Status {
    DOMAIN
        .status(Code::Internal, "INTERNAL", "internal error")
        .build()
}
