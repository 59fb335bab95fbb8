DROP INDEX orders_to_be_paid;
ALTER TABLE orders DROP CONSTRAINT orders_unpaid,
    DROP CONSTRAINT orders_overdue,
    DROP COLUMN overdue_at,
    DROP CONSTRAINT orders_cancelled_by_check,
    ADD CONSTRAINT orders_cancelled_by_check
        CHECK (cancelled_by IN ('user', 'out_of_stock', 'not_paid_in_time', 'payment_failed'));
