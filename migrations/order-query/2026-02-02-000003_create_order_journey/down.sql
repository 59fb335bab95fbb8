DROP TABLE order_journey;
