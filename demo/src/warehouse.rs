//! The warehouse: fills its shelves, counts them, and sends orders off.

use anyhow::{Context, Result};
use contracts::shop::inventory::v1::{AdjustStockRequest, GetStockRequest, SetStockRequest, Stock};
use contracts::shop::order::v1::{MarkDeliveredRequest, Order, OrderStatus, ShipOrderRequest};
use tokio::task::JoinSet;
use tonic::Status;

use crate::load::{self, Told, ToldOrder, twice};
use crate::pay::Look;
use crate::plan::{Repeat, Shelf, Ship};
use crate::rpc::{Clients, call};

const AT_ONCE: usize = 16;

/// SetStock of every product.
pub(crate) async fn fill(clients: &Clients, stock: &[Shelf]) -> Result<Told> {
    let mut told = Told::default();
    for shelves in stock.chunks(AT_ONCE) {
        let mut tasks: JoinSet<Result<Told>> = JoinSet::new();
        for shelf in shelves.iter().cloned() {
            let clients = clients.clone();
            tasks.spawn(async move { set(&clients, shelf.set, shelf.set_repeat).await });
        }
        while let Some(set) = tasks.join_next().await {
            told.merge(set??);
        }
    }
    Ok(told)
}

async fn set(clients: &Clients, request: SetStockRequest, repeat: Repeat) -> Result<Told> {
    let mut told = Told::default();
    let setting = twice(repeat, &mut told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.inventory();
            async move { client.set_stock(request).await }
        })
    });
    let stock = setting
        .await
        .context("SetStock failed")?
        .stock
        .unwrap_or_default();
    let as_asked = Stock {
        product_id: request.product_id.clone(),
        available: request.available,
        version: 1,
        updated_at: stock.updated_at,
        ..Stock::default()
    };
    if stock != as_asked {
        told.problems
            .push(format!("SetStock answered {stock:?} to {request:?}"));
    }
    told.stocked.insert(request.product_id, request.available);
    Ok(told)
}

/// AdjustStock.
pub(crate) async fn adjust(clients: &Clients, request: AdjustStockRequest, repeat: Repeat) -> Result<Told> {
    let mut told = Told::default();
    let adjusting = twice(repeat, &mut told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.inventory();
            async move { client.adjust_stock(request).await }
        })
    });
    adjusting.await.context("AdjustStock failed")?;
    told.stocked.insert(request.product_id, request.change);
    Ok(told)
}

/// GetStock.
pub(crate) async fn get(clients: &Clients, product_id: &str) -> Result<Stock, Status> {
    let request = GetStockRequest {
        product_id: product_id.to_owned(),
    };
    let answer = call(request, |request| {
        let mut client = clients.inventory();
        async move { client.get_stock(request).await }
    });
    Ok(answer.await?.stock.unwrap_or_default())
}

/// Ships an order once it is confirmed, and sees it arrive. One that is not confirmed in time is left as it is.
pub(crate) async fn send_off(
    clients: &Clients,
    plan: &Ship,
    order: &Order,
    about: &mut ToldOrder,
    told: &mut Told,
) -> Result<()> {
    let Some(confirmed) = confirmed(clients, order).await? else {
        return Ok(());
    };
    let request = ShipOrderRequest {
        request_id: plan.request_id.clone(),
        order_id: order.order_id.clone(),
        carrier: plan.carrier.clone(),
        tracking_number: plan.tracking_number.clone(),
        expected_version: if plan.expects_version {
            confirmed.version
        } else {
            0
        },
    };
    let shipping = twice(plan.repeat, told, PartialEq::eq, || {
        call(request.clone(), |request| {
            let mut client = clients.orders();
            async move { client.ship_order(request).await }
        })
    });
    let shipped = match shipping.await {
        Ok(response) => response.order.context("ShipOrder answered without an order")?,
        Err(refusal) => {
            told.problems
                .push(format!("ShipOrder of {confirmed:?} answered {refusal:?}"));
            return Ok(());
        }
    };
    let as_asked = Order {
        status: OrderStatus::Shipped.into(),
        version: confirmed.version + 1,
        carrier: plan.carrier.clone(),
        tracking_number: plan.tracking_number.clone(),
        updated_at: shipped.updated_at,
        ..confirmed
    };
    if shipped != as_asked {
        told.problems
            .push(format!("ShipOrder answered {shipped:?} instead of {as_asked:?}"));
    }
    if let Some(request_id) = &plan.deliver {
        let request = MarkDeliveredRequest {
            request_id: request_id.clone(),
            order_id: order.order_id.clone(),
            expected_version: shipped.version,
        };
        let delivering = twice(plan.repeat, told, PartialEq::eq, || {
            call(request.clone(), |request| {
                let mut client = clients.orders();
                async move { client.mark_delivered(request).await }
            })
        });
        match delivering.await {
            Ok(response) => about.delivered = response.order,
            Err(refusal) => told.problems.push(format!("MarkDelivered answered {refusal:?}")),
        }
    }
    about.shipped = Some(shipped);
    Ok(())
}

/// The order once it is confirmed; nothing when it is cancelled, or not confirmed in time.
async fn confirmed(clients: &Clients, order: &Order) -> Result<Option<Order>> {
    let mut look = Look::new();
    while look.again().await {
        let now = load::get(clients, &order.user_id, &order.order_id).await?;
        match now.status() {
            OrderStatus::Confirmed => return Ok(Some(now)),
            OrderStatus::Cancelled => return Ok(None),
            _ => {}
        }
    }
    Ok(None)
}
