ALTER TABLE order_views DROP COLUMN payment_id;
DROP TABLE order_payments;
