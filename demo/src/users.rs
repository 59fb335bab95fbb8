//! The users: they sign up, some move to another address, and each is asked for again in the end.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use contracts::shop::user::v1::{CreateUserRequest, GetUserRequest, UpdateUserRequest, User};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::load::{Told, refused, twice};
use crate::plan::{self, Repeat};
use crate::rpc::{Clients, call};

const AT_ONCE: usize = 16;

/// What clients were told of a user.
#[derive(Debug, Clone, Default)]
pub(crate) struct ToldUser {
    /// As he is after the last answer.
    pub(crate) user: User,
    /// Every address that he has had.
    pub(crate) emails: Vec<String>,
}

/// CreateUser of all. By the ids that the plan calls them, the ones that they have.
pub(crate) async fn sign_up(
    clients: &Clients,
    users: &[plan::User],
) -> Result<(Told, BTreeMap<String, String>)> {
    let (mut all, mut ids) = (Told::default(), BTreeMap::new());
    for some in users.chunks(AT_ONCE) {
        let mut tasks: JoinSet<Result<(Told, String)>> = JoinSet::new();
        for user in some.iter().cloned() {
            let clients = clients.clone();
            tasks.spawn(async move { Ok((create(&clients, &user).await?, user.stand_in)) });
        }
        while let Some(created) = tasks.join_next().await {
            let (told, stand_in) = created??;
            let about = told.users.first().context("a user was created")?;
            ids.insert(stand_in, about.user.user_id.clone());
            all.merge(told);
        }
    }
    Ok((all, ids))
}

async fn create(clients: &Clients, plan: &plan::User) -> Result<Told> {
    let mut told = Told::default();
    let request = &plan.create;
    let creating = twice(plan.repeat, &mut told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.users();
            async move { client.create_user(request).await }
        })
    });
    let user = creating
        .await
        .context("CreateUser failed")?
        .user
        .unwrap_or_default();
    let as_asked = User {
        user_id: user.user_id.clone(),
        created_at: user.created_at,
        updated_at: user.created_at,
        ..details(request, 1)
    };
    if user != as_asked || user.user_id.is_empty() {
        told.problems.push(format!(
            "CreateUser of {} answered otherwise than it was asked",
            user.user_id
        ));
    }
    if plan.is_tried_again {
        // The same address, as somebody else would write it.
        let (name, domain) = request.email.split_once('@').context("an address has an @")?;
        let somebody_else = CreateUserRequest {
            request_id: Uuid::new_v4().to_string(),
            email: format!("{}@{}", name.to_uppercase(), domain.to_uppercase()),
            ..request.clone()
        };
        let answer = call(somebody_else, |request| {
            let mut client = clients.users();
            async move { client.create_user(request).await }
        });
        told.merge(refused(
            "an address that somebody has",
            &[Code::AlreadyExists],
            answer.await,
        ));
    }
    told.users.push(ToldUser {
        emails: vec![user.email.clone()],
        user,
    });
    Ok(told)
}

fn details(request: &CreateUserRequest, version: i64) -> User {
    User {
        email: request.email.clone(),
        first_name: request.first_name.clone(),
        last_name: request.last_name.clone(),
        version,
        ..User::default()
    }
}

/// UpdateUser: he has another address from now on.
pub(crate) async fn relocate(clients: &Clients, request: UpdateUserRequest, repeat: Repeat) -> Result<Told> {
    let mut told = Told::default();
    let moving = twice(repeat, &mut told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.users();
            async move { client.update_user(request).await }
        })
    });
    let user = moving
        .await
        .context("UpdateUser failed")?
        .user
        .unwrap_or_default();
    if Some(&user.email) != request.email.as_ref() || user.version != 2 {
        told.problems.push(format!(
            "UpdateUser of {} answered otherwise than it was asked",
            request.user_id
        ));
    }
    told.moved.push(user);
    Ok(told)
}

/// GetUser.
pub(crate) async fn get(clients: &Clients, user_id: &str) -> Result<User, Status> {
    let request = GetUserRequest {
        user_id: user_id.to_owned(),
    };
    let answer = call(request, |request| {
        let mut client = clients.users();
        async move { client.get_user(request).await }
    });
    Ok(answer.await?.user.unwrap_or_default())
}
