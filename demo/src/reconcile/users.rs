//! Users, as clients were told, as they are, and as GetUser answers.

use std::collections::HashMap;

use contracts::shop::user::v1::User;

use super::Parts;

/// Never names an address: what is printed here may be kept.
pub(super) fn compare(parts: &Parts, problems: &mut Vec<String>) {
    let by_id = |users: &'_ [User]| -> HashMap<String, User> {
        users
            .iter()
            .map(|user| (user.user_id.clone(), user.clone()))
            .collect()
    };
    let (mut rows, answers) = (by_id(&parts.user_rows), by_id(&parts.user_answers));
    for told in &parts.users {
        let id = &told.user.user_id;
        if rows.remove(id).as_ref() != Some(&told.user) {
            problems.push(format!("user {id} is not as a client was told"));
        }
        if answers.get(id) != Some(&told.user) {
            problems.push(format!(
                "GetUser of {id} answers otherwise than a client was told before"
            ));
        }
    }
    problems.extend(
        rows.keys()
            .map(|id| format!("user {id} is there and nobody created him")),
    );
}
